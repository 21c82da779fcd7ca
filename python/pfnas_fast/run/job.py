# SPDX-License-Identifier: Apache-2.0
"""The whole job as stages over one run folder: each reads what earlier ones wrote, and is passed over when
done.

    pretrain -> transfer -> warmup -> label -> filter -> prune -> train -> search -> report     (filtered
    samplers) pretrain -> transfer -> train  -> label -> filter -> search -> report                       (all
    others)

Samplers without a filter train in one piece and label afterwards; their filter only guides the search, as
Once-for-All's accuracy predictor does. Training compute, the number of labelled paths and of evaluated
candidates are the same for all.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch

from pfnas_fast.data import (
    Augmentation,
    ClassificationData,
    DetectionData,
    Roles,
    check_images,
    load_classification,
    load_detection,
)
from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.errors import InputError
from pfnas_fast.filter import PathFilter
from pfnas_fast.filter.metrics import tau_within_groups
from pfnas_fast.filter.report import filter_report
from pfnas_fast.filter.samplers import Balanced, Deferred, Filtered, RandomPrune, Sampler, Uniform
from pfnas_fast.run.config import RunConfig
from pfnas_fast.run.folder import Run
from pfnas_fast.run.labels import measure_drift, measure_labels, run_label
from pfnas_fast.run.refresh import filter_in_force, filtered_sampler, refresh_of
from pfnas_fast.space import CostModel, Space, load_space
from pfnas_fast.supernet import ClassificationSupernet
from pfnas_fast.train import classification_accuracy, pretrain, train
from pfnas_fast.train.distributed import decide_together, rank_and_size
from pfnas_fast.train.engine import Progress
from pfnas_fast.train.schedules import equal_compute_steps


@dataclass
class Job:
    """One run: its settings, its folder, and what is loaded so far.

    Args:
        run: The folder.
        config: Settings; they were checked when `run` was opened with them.
        progress: Called after each step of a stage.
    """

    run: Run
    config: RunConfig
    progress: Progress | None = None

    @functools.cached_property
    def space(self) -> Space:
        space = load_space(self.config.space)
        self._agree("space.json", space.to_dict(), "the search space")
        return space

    @functools.cached_property
    def data(self) -> DetectionData:
        roles = Roles(label=self.config.label_fraction, calib=self.config.calib_images)
        data = load_detection(
            self.config.data, roles=roles, seed=self.config.seed, fraction=self.config.train_fraction
        )
        self._agree("splits.json", data.splits(), "the images in data")
        return data

    def _agree(self, name: str, content: Any, what: str) -> None:
        """Write `name` once; a run must not go on with another content."""
        content = json.loads(json.dumps(content))
        if self.run.has(name):
            if self.run.read_json(name) != content:
                raise InputError(
                    f"expected {what} of {self.run.folder / name} (the run was started with it), "
                    "got another; choose another --out for another run"
                )
        elif rank_and_size()[0] == 0:
            self.run.write_json(name, content)

    @functools.cached_property
    def pretrain_data(self) -> ClassificationData:
        return load_classification(self.config.pretrain_data, seed=self.config.seed)

    @functools.cached_property
    def cost(self) -> CostModel:
        return CostModel(self.space, num_classes=self.data.num_classes)

    def new_net(self) -> DetectionSupernet:
        """A detection supernet with the run's initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            net = DetectionSupernet(
                self.space, num_classes=self.data.num_classes, backend=self.config.backend
            )
        return net.to(self.config.device)

    def load_net(self, checkpoint: str) -> DetectionSupernet:
        """The supernet as stage `checkpoint` left it, in eval mode."""
        net = self.new_net()
        net.load_state_dict(self.load_finished(checkpoint)["model"])
        return net.eval()

    def load_finished(self, checkpoint: str) -> dict[str, Any]:
        """A checkpoint of a stage that came to its end."""
        state = self.run.load(checkpoint)
        if not state["finished"]:
            raise InputError(
                f"expected a finished stage {checkpoint!r} in {self.run.folder}, got step {state['step']}; "
                f"run `pfnas {checkpoint} --out {self.run.folder}` first"
            )
        return state

    def load_filter(self, checkpoint: str = "filter") -> PathFilter:
        """The filter of S4, or that of another checkpoint."""
        flt = PathFilter(
            self.space,
            cost=self.cost,
            condition=self.filter_condition,
            num_members=self.config.filter_members,
        )
        flt.load_state_dict(self.run.load(checkpoint))
        return flt

    @property
    def filter_condition(self) -> str:
        return "none" if self.config.sampler == "filter_unconditioned" else "concat"

    @property
    def labels_per_bin(self) -> int:
        """Filtered runs label again during and after training; the others get as many labels at once."""
        config = self.config
        later = self.relabels_per_bin + config.filter_refreshes * self.refresh_labels_per_bin
        return config.labels_per_bin + (0 if config.uses_filter else later)

    @property
    def refresh_labels_per_bin(self) -> int:
        """Half of the labels, and at least two per bin."""
        return max(2, self.config.labels_per_bin // 2)

    @property
    def relabels_per_bin(self) -> int:
        """A quarter of the labels, and at least two per bin: one path has nothing to be ranked against."""
        return max(2, self.config.labels_per_bin // 4)

    def augmentation(self) -> Augmentation:
        return Augmentation(
            flip=0.5 if self.config.hflip else 0.0, vertical_flip=0.5 if self.config.vflip else 0.0
        )


TRAINING_STAGES = ("pretrain", "warmup", "train")


def stage_names(config: RunConfig) -> list[str]:
    """Stages of a run, in order."""
    names = ["pretrain"] if config.pretrain else []
    if config.uses_filter:
        return [*names, "transfer", "warmup", "label", "filter", "prune", "train", "search", "report"]
    return [*names, "transfer", "train", "label", "filter", "search", "report"]


def run_pretrain(job: Job) -> None:
    """S0: a classification supernet of the same backbone."""
    config, data = job.config, job.pretrain_data
    space = job.space.for_classification()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = ClassificationSupernet(space, num_classes=len(data.class_names), backend=config.backend).to(
            config.device
        )
    pretrain(
        net,
        data,
        steps=config.pretrain_steps,
        batch_size=config.pretrain_batch_size,
        hflip=config.hflip,
        optimizer=config.pretrain_optimizer,
        learning_rate=config.pretrain_learning_rate,
        weight_decay=config.pretrain_weight_decay,
        ema_decay=config.ema_decay,
        checkpoint_every=config.checkpoint_every,
        run=job.run,
        progress=job.progress,
    )
    if rank_and_size()[0] != 0:
        return
    accuracy = {
        name: classification_accuracy(net, data, path)
        for name, path in (("largest", space.max_path()), ("smallest", space.min_path()))
    }
    job.run.write_json("pretrain.json", {"top1": accuracy, "chance": 1 / len(data.class_names)})


def run_transfer(job: Job) -> None:
    """S1: put the pre-trained backbone under a fresh neck and head."""
    net = job.new_net()
    if job.config.pretrain:
        net.load_backbone(job.load_finished("pretrain")["model"])
    job.run.save("transfer", {"model": net.state_dict(), "finished": True})


def run_warmup(job: Job) -> None:
    """S2: train over the whole space with budget-balanced paths, so that labels mean something."""
    check_images(job.data.fit)
    config = job.config
    after = training_steps(config, job.cost)["train"] if config.joins_rate_curves else 0
    net, sampler = job.load_net("transfer"), Balanced(job.space)
    _train(job, net, sampler, "warmup", "sandwich", config.warmup_steps, steps_after=after)


def run_filter(job: Job) -> None:
    """S4: fit the path filter and report how far it can be trusted."""
    job.run.require("labels.csv")
    labels = measure_labels(job)
    flt = PathFilter(
        job.space, cost=job.cost, condition=job.filter_condition, num_members=job.config.filter_members
    )
    flt.fit(labels.paths, labels.label, labels.macs_m, label_sd=labels.label_sd, seed=job.config.seed)
    report = filter_report(
        flt,
        labels.paths,
        labels.label,
        labels.macs_m,
        label_halves=labels.halves(labels.label_name),
        label_sd=labels.label_sd,
        num_bins=job.config.num_bins,
        seed=job.config.seed,
        png=job.run.path("filter/report.png"),
    )
    report["label"] = {"name": labels.label_name, "reliability": labels.reliability, "macs_t": labels.macs_t}
    report["filter_used"] = bool(job.config.uses_filter and (report["use_filter"] or job.config.force_filter))
    job.run.save("filter", flt.state_dict())
    job.run.write_json("filter/report.json", report)


def run_prune(job: Job) -> None:
    """S5: the score a path must reach at its budget to stay in the space."""
    sampler = Filtered(job.space, job.load_filter(), keep=job.config.keep).bind(job.cost)
    assert sampler.thresholds is not None
    job.run.write_json("filter/thresholds.json", sampler.thresholds.state_dict())


def run_train(job: Job) -> None:
    """S6 (or all of the training, for samplers without a filter), then label again and report the drift."""
    config = job.config
    check_images(job.data.fit)
    sampler = train_sampler(job)
    if not config.uses_filter:
        _train(
            job,
            job.load_net("transfer"),
            sampler,
            "train",
            config.schedule,
            config.warmup_steps + config.train_steps,
        )
        return
    net, before = job.load_net("warmup"), config.warmup_steps if config.joins_rate_curves else 0
    _train(job, net, sampler, "train", config.schedule, config.train_steps, steps_before=before)
    if rank_and_size()[0] != 0:
        return
    labels = measure_drift(job)
    taus = {
        name: tau_within_groups(flt.score(labels.paths, labels.macs_m), labels.label, labels.bins)
        for name, flt in (("", filter_in_force(job)[0]), ("_unrefreshed", job.load_filter()))
    }
    report = {
        "num": len(labels.paths),
        **{f"tau_within_bins{name}": tau for name, tau in taus.items()},
        "tau_within_bins_macs_only": tau_within_groups(labels.macs_m, labels.label, labels.bins),
        "label": labels.label_name,
    }
    job.run.write_json("filter/drift.json", report)


def train_sampler(job: Job) -> Sampler:
    """The sampler of S6; a filter that failed its own report gives way to `balanced`, and the run says so.

    A refresh may bring a filter that passes: it takes over then.
    """
    config, space = job.config, job.space
    if config.sampler == "uniform":
        return Uniform(space)
    if config.sampler == "balanced":
        return Balanced(space)
    if config.sampler == "random_prune":
        return RandomPrune(space, keep=config.keep, seed=config.seed)
    if not job.run.read_json("filter/report.json")["filter_used"]:
        text = "the filter does not rank better than MACs alone: training goes on with `balanced`"
        if config.filter_refreshes == 0:
            job.run.log("note", text=text)
            return Balanced(space)
        job.run.log("note", text=f"{text}, until the filter of a refresh does")
        return Deferred(space, functools.partial(filtered_sampler, job))
    return filtered_sampler(job, job.load_filter())


def equal_steps(
    schedule: str, cost: CostModel, sampler: Sampler, sandwich_steps: int, *, distill: bool
) -> int:
    """Steps that execute the MACs of `sandwich_steps` sandwich steps with balanced paths."""
    if schedule == "sandwich" and type(sampler) in (Balanced, Deferred):
        return sandwich_steps
    balanced = Balanced(cost.space).bind(cost)
    return equal_compute_steps(schedule, cost, sampler.bind(cost), balanced, sandwich_steps, distill=distill)


def training_steps(config: RunConfig, cost: CostModel) -> dict[str, int]:
    """Steps of the detection stages, before any filter exists (a filter's own steps differ a little)."""
    space = cost.space
    sampler: Sampler = {
        "uniform": Uniform(space),
        "random_prune": RandomPrune(space, keep=config.keep, seed=config.seed),
    }.get(config.sampler, Balanced(space))
    distill = config.distill_weight != 0
    if config.uses_filter:
        train_steps = equal_steps(config.schedule, cost, sampler, config.train_steps, distill=distill)
        return {"warmup": config.warmup_steps, "train": train_steps}
    total = config.warmup_steps + config.train_steps
    return {"train": equal_steps(config.schedule, cost, sampler, total, distill=distill)}


def _train(
    job: Job,
    net: DetectionSupernet,
    sampler: Sampler,
    stage: str,
    schedule: str,
    sandwich_steps: int,
    **place: int,
) -> None:
    config = job.config
    steps = equal_steps(schedule, job.cost, sampler, sandwich_steps, distill=config.distill_weight != 0)
    if isinstance(sampler, (Filtered, Deferred)):
        sampler.decay_steps = steps
    train(
        net,
        job.data.fit,
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        distill_after=config.distill_after,
        distill_weight=config.distill_weight,
        ema_decay=config.ema_decay,
        augmentation=job.augmentation(),
        num_workers=config.num_workers,
        checkpoint_every=config.checkpoint_every,
        run=job.run,
        stage=stage,
        progress=job.progress,
        refresh=refresh_of(job, sampler),
        **place,
    )


def is_done(job: Job, stage: str) -> bool:
    """Whether what `stage` writes last is there and whole."""
    run = job.run
    if stage in ("pretrain", "transfer", "warmup", "train"):
        if not run.has_checkpoint(stage) or not run.load(stage)["finished"]:
            return False
        if stage == "pretrain":
            return run.has("pretrain.json")
        return stage != "train" or not job.config.uses_filter or run.has("filter/drift.json")
    if stage == "label":
        return run.has("labels.json")
    return run.has(
        {
            "filter": "filter/report.json",
            "prune": "filter/thresholds.json",
            "search": "pareto.json",
            "report": "report.json",
        }[stage]
    )


def _stage_function(name: str) -> Callable[[Job], Any]:
    from pfnas_fast.run.finish import run_report, run_search

    return {
        "pretrain": run_pretrain,
        "transfer": run_transfer,
        "warmup": run_warmup,
        "label": run_label,
        "filter": run_filter,
        "prune": run_prune,
        "train": run_train,
        "search": run_search,
        "report": run_report,
    }[name]


def run_stage(job: Job, name: str) -> bool:
    """Run one stage unless it is done; returns whether it ran.

    Under `torchrun` all ranks train; the other stages run on rank 0 while the rest wait.
    """
    is_first = rank_and_size()[0] == 0
    if not decide_together(is_first and not is_done(job, name)):
        return False
    clock = time.perf_counter()
    if is_first or name in TRAINING_STAGES:
        _stage_function(name)(job)
    if is_first:
        job.run.log("stage_done", stage=name, seconds=round(time.perf_counter() - clock, 2))
    decide_together(True)
    return True


def run_all(job: Job, *, on_stage: Callable[[str, bool], None] | None = None) -> None:
    """Run every stage that is not done yet, in order.

    Unreadable files of every role are refused first; no pixel of a later role is decoded for that.
    """
    if rank_and_size()[1] > 1 and job.config.finetune_steps:
        raise InputError("run: expected 0 for finetune_steps under torchrun, got a positive number")
    if rank_and_size()[0] == 0:
        data = job.data
        check_images(data.fit, data.label, data.select, data.test, decode=False)
        if job.config.pretrain:
            check_images(job.pretrain_data.train, job.pretrain_data.val, decode=False)
    for name in stage_names(job.config):
        ran = run_stage(job, name)
        if on_stage is not None:
            on_stage(name, ran)


def open_job(
    folder: str | FilePath, config: RunConfig | None = None, progress: Progress | None = None
) -> Job:
    """Open or start the run in `folder`."""
    run = Run(folder, config=config) if config is not None else Run.open(folder)
    assert run.config is not None
    return Job(run, run.config, progress)
