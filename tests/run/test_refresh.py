# SPDX-License-Identifier: Apache-2.0
"""The filter's refresh in mid-training: what it writes, that it resumes exactly, and when it is refused."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_settings import TOY_SETTINGS

import pfnas_fast as pf
from pfnas_fast.filter import Balanced, Deferred, Filtered
from pfnas_fast.run import job as job_module
from pfnas_fast.run import refresh as refresh_module
from pfnas_fast.run.finish import compute_ledger, search_filter
from pfnas_fast.run.job import Job, open_job, run_stage, stage_names, train_sampler
from pfnas_fast.run.refresh import filter_in_force, filter_verdict, pruned_space, read_refreshes, refresh_of
from pfnas_fast.train import Refresh
from pfnas_fast.train.schedules import make_phases, refresh_steps

SETTINGS = [
    *TOY_SETTINGS,
    "pretrain=false",
    "checkpoint_every=3",
    "search_flood=0",
    "num_budgets=2",
    "candidates_per_budget=1",
]


class Interruption(Exception):
    """Stands for a kill."""


class Interrupt:
    """A progress callback that raises once at each of some places."""

    def __init__(self, *places: tuple[str, int]) -> None:
        self.places = list(places)

    def __call__(self, stage: str, done: int, total: int, info: dict[str, float]) -> None:
        if (stage, done) in self.places:
            self.places.remove((stage, done))
            raise Interruption(stage)


def _config(data: Path, *extra: str) -> pf.RunConfig:
    return pf.make_config(overrides={"data": str(data)}, assignments=[*SETTINGS, *extra])


@pytest.fixture(scope="module")
def pruned_run(toy_detection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which all stages before the training are done."""
    folder = tmp_path_factory.mktemp("refresh") / "run"
    job = open_job(folder, _config(toy_detection))
    for stage in stage_names(job.config)[: stage_names(job.config).index("train")]:
        assert run_stage(job, stage)
    return folder


def _copy(folder: Path, target: Path) -> Job:
    shutil.copytree(folder, target)
    return open_job(target)


def _train_with_interruptions(folder: Path, target: Path) -> Job:
    """Train in a copy, killed three times.

    Among the labels of the refresh; after it, where the last checkpoint is older; where it is newer.
    """
    places = (("refresh", 2), ("train", 5), ("train", 7))
    interrupt = Interrupt(*places)
    for _ in places:
        job = open_job(_copy_once(folder, target))
        job.progress = interrupt
        with pytest.raises(Interruption):
            run_stage(job, "train")
    assert interrupt.places == []
    job = open_job(target)
    assert len(job.run.read_log("refresh")) == 1
    run_stage(job, "train")
    return job


def _same_weights(one: Job, other: Job) -> bool:
    a, b = (job.run.load("train")["model"] for job in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def _without_seconds(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "seconds"}


def test_interrupted_around_the_refresh_ends_like_an_uninterrupted_run(
    pruned_run: Path, tmp_path: Path
) -> None:
    whole = _copy(pruned_run, tmp_path / "whole")
    run_stage(whole, "train")
    (entry,) = read_refreshes(whole)
    assert (entry["step"], entry["num_labels"], entry["filter_used"]) == (4, 6, True)
    assert set(entry["drift"]) == {"kept_by_both", "score_tau"}

    job = _train_with_interruptions(pruned_run, tmp_path / "cut")
    assert _same_weights(whole, job)
    assert _without_seconds(read_refreshes(job)[0]) == _without_seconds(entry)
    for name in ("refresh.csv", "relabels.csv", "filter/drift.json", "filter/refresh_thresholds.json"):
        assert job.run.path(name).read_text() == whole.run.path(name).read_text(), name


def _copy_once(folder: Path, target: Path) -> Path:
    if not target.exists():
        shutil.copytree(folder, target)
    return target


def test_what_follows_uses_the_refreshed_filter(
    pruned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _copy(pruned_run, tmp_path / "run")
    run_stage(job, "train")
    first, last = job.load_filter(), filter_in_force(job)[0]
    population = np.array(job.space.encode([job.space.min_path(), job.space.max_path()]))
    assert (last.score(population) == job.load_filter("filter-refresh").score(population)).all()
    assert (last.score(population) != first.score(population)).any()
    assert job.run.read_json("filter/drift.json")["num"] == 6

    fitted: list[int] = []
    fit = pf.PathFilter.fit
    monkeypatch.setattr(
        pf.PathFilter,
        "fit",
        lambda self, paths, *a, **k: fitted.append(len(paths)) or fit(self, paths, *a, **k),
    )
    search_filter(job)
    assert fitted == [12 + 6 + 6]
    monkeypatch.undo()
    run_stage(job, "search")
    ledger = compute_ledger(job)
    assert ledger["refresh"]["macs_t"] == read_refreshes(job)[0]["macs_t"] > 0
    assert ledger["refresh"]["seconds"] > read_refreshes(job)[0]["seconds"] > 0
    assert ledger["total"]["macs_t"] == pytest.approx(
        sum(entry["macs_t"] for name, entry in ledger.items() if name != "total")
    )
    run_stage(job, "report")
    report = job.run.read_json("report.json")
    assert report["filter_refreshes"] == read_refreshes(job)
    assert report["macs_ap_correlation"]["refresh"]["num"] == 6


def test_a_refused_refresh_keeps_the_earlier_filter(
    toy_detection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = job_module.filter_report

    def judge(*args: Any, **options: Any) -> dict[str, Any]:
        return {**report(*args, **options), "use_filter": True}

    def refuse(*args: Any, **options: Any) -> dict[str, Any]:
        return {**report(*args, **options), "use_filter": False, "reason": "no better than MACs"}

    monkeypatch.setattr(job_module, "filter_report", judge)
    monkeypatch.setattr(refresh_module, "filter_report", refuse)
    config = _config(toy_detection, "force_filter=false", "sampler=bestup", "filter_refreshes=2")
    job = open_job(tmp_path / "run", config)
    for stage in stage_names(config)[: stage_names(config).index("search")]:
        run_stage(job, stage)
    entries = read_refreshes(job)
    assert [entry["name"] for entry in entries] == ["refresh", "refresh-2"]
    assert not any(entry["filter_used"] for entry in entries)
    assert entries[0]["reason"] == "no better than MACs; the earlier filter stays"
    flt, file = filter_in_force(job)
    population = np.array(job.space.encode([job.space.min_path(), job.space.max_path()]))
    assert (flt.score(population) == job.load_filter().score(population)).all()
    assert file == "filter/thresholds.json"


@pytest.fixture(scope="module")
def refused_run(pruned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder before its training whose filter did not rank better than MACs."""
    folder = tmp_path_factory.mktemp("refused") / "run"
    shutil.copytree(pruned_run, folder)
    run = pf.Run.open(folder)
    text = run.path("config.yaml").read_text()
    assert "force_filter: true" in text
    run.path("config.yaml").write_text(text.replace("force_filter: true", "force_filter: false"))
    report = run.read_json("filter/report.json")
    run.write_json("filter/report.json", {**report, "filter_used": False, "reason": "S4 saw too little"})
    return folder


def _judge_refreshes(monkeypatch: pytest.MonkeyPatch, *verdicts: bool) -> None:
    """Let the reports of the following refreshes come out as given."""
    report, left = refresh_module.filter_report, list(verdicts)

    def judge(*args: Any, **options: Any) -> dict[str, Any]:
        verdict = left.pop(0)
        return {**report(*args, **options), "use_filter": verdict, "reason": f"judged {verdict}"}

    monkeypatch.setattr(refresh_module, "filter_report", judge)


def test_a_refresh_switches_a_run_over_whose_filter_was_refused(
    refused_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _judge_refreshes(monkeypatch, True, True)  # once in each folder: a finished refresh is not judged again
    whole = _copy(refused_run, tmp_path / "whole")
    sampler = train_sampler(whole)
    assert isinstance(sampler, Deferred)
    assert sampler.successor is None
    balanced = Balanced(whole.space).bind(whole.cost).population_for_step(1, 0, 2)
    assert (sampler.bind(whole.cost).population_for_step(1, 0, 2) == balanced).all()
    run_stage(whole, "train")
    (entry,) = read_refreshes(whole)
    assert (entry["step"], entry["num_labels"], entry["filter_used"], entry["switched"]) == (4, 6, True, True)
    assert whole.run.read_log("refresh")[-1]["switched"] is True
    assert filter_verdict(whole) == (True, "S4 saw too little; used from step 4 on: judged True")
    assert filter_in_force(whole)[1] == "filter/refresh_thresholds.json"

    job = _train_with_interruptions(refused_run, tmp_path / "cut")
    assert _same_weights(whole, job)
    assert _without_seconds(read_refreshes(job)[0]) == _without_seconds(entry)

    # A resumed sampler draws what the sampler of the new filter draws, and explores as late as that does.
    resumed = train_sampler(job).bind(job.cost)
    assert isinstance(resumed, Deferred)
    resumed.decay_steps = 8
    refresh = refresh_of(job, resumed)
    assert refresh is not None
    refresh.call(0, 4, None)
    expected = Filtered(
        job.space, filter_in_force(job)[0], keep=job.config.keep, epsilon=job.config.epsilon, decay_steps=8
    ).bind(job.cost)
    drawn = resumed.population_for_step(1, 4, 40)
    assert (drawn == expected.population_for_step(1, 4, 40)).all()
    assert pruned_space(job).accept(drawn[-40:]).mean() > 0.8  # a third of balanced draws would be

    run_stage(job, "search")
    run_stage(job, "report")
    report = job.run.read_json("report.json")
    assert report["filter_used"]
    assert report["filter_refreshes"][0]["switched"]


def test_a_run_stays_balanced_while_every_filter_is_refused(
    refused_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _judge_refreshes(monkeypatch, False)
    ends = []
    for name in ("one", "none"):
        job = _copy(refused_run, tmp_path / name)
        if name == "none":
            text = job.run.path("config.yaml").read_text()
            job.run.path("config.yaml").write_text(text.replace("filter_refreshes: 1", "filter_refreshes: 0"))
            job = open_job(tmp_path / name)
            assert type(train_sampler(job)) is Balanced
        run_stage(job, "train")
        ends.append(torch.load(job.run.folder / "checkpoints" / "train.pt")["model"])
        assert filter_verdict(job)[0] is False
        if name == "one":
            (entry,) = read_refreshes(job)
            assert (entry["filter_used"], entry["switched"]) == (False, False)
            assert entry["reason"] == "judged False; sampling stays balanced"
            assert job.run.read_json("filter/drift.json")["num"] == 6
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_later_refresh_may_still_switch_over(
    refused_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _judge_refreshes(monkeypatch, False, True, False)
    job = _copy(refused_run, tmp_path / "run")
    text = job.run.path("config.yaml").read_text()
    job.run.path("config.yaml").write_text(text.replace("filter_refreshes: 1", "filter_refreshes: 3"))
    job = open_job(tmp_path / "run")
    run_stage(job, "train")
    entries = read_refreshes(job)
    assert [(entry["filter_used"], entry["switched"]) for entry in entries] == [
        (False, False),
        (True, True),
        (False, False),
    ]
    assert entries[2]["reason"] == "judged False; the earlier filter stays"
    assert filter_in_force(job)[1] == "filter/refresh-2_thresholds.json"


def test_there_is_nothing_to_refresh_without_a_filter(pruned_run: Path) -> None:
    job = open_job(pruned_run)
    assert refresh_of(job, Balanced(job.space)) is None
    refresh = refresh_of(job, train_sampler(job))
    assert refresh is not None
    with pytest.raises(pf.InputError, match=r"expected filter/refresh.json .* `pfnas train"):
        refresh.call(0, 4, None)


def test_refreshes_cut_the_steps_that_the_sampler_draws_for() -> None:
    space = pf.load_space("tiny")
    assert refresh_steps(make_phases("sandwich", space, 90), 2) == (30, 60)
    assert refresh_steps(make_phases("single", space, 2), 5) == (1,)
    assert refresh_steps(make_phases("sandwich", space, 90), 0) == ()
    phases = make_phases("progressive", space, 590)
    assert refresh_steps(phases, 1) == (530,)  # the last phase, of 120 steps, is the only one


def test_a_refresh_sees_averaged_weights_and_leaves_the_training_alone(
    toy_detection: Path, tmp_path: Path
) -> None:
    data, space, run = pf.load_detection(toy_detection), pf.load_space("tiny"), pf.Run(tmp_path / "run")
    seen: list[tuple[int, int, bool, bool]] = []

    def call(index: int, step: int, net: torch.nn.Module | None) -> None:
        assert net is not None
        saved = run.load("train")  # written at this very step
        parameters = dict(net.named_parameters())
        averaged = all(torch.equal(parameters[name], value) for name, value in saved["average"].items())
        trained = all(torch.equal(parameters[name], saved["model"][name]) for name in parameters)
        seen.append((index, step, averaged, trained))
        torch.rand(3)  # a refresh may draw
        with torch.no_grad():
            next(net.parameters()).zero_()

    ends = []
    for refresh, folder in ((Refresh(1, call), run), (None, pf.Run(tmp_path / "without"))):
        torch.manual_seed(0)
        net = pf.DetectionSupernet(space, num_classes=2, backend="reference")
        pf.train(
            net,
            data.fit,
            steps=6,
            batch_size=2,
            checkpoint_every=3,
            run=folder,
            stage="train",
            refresh=refresh,
        )
        ends.append(net.state_dict())
    assert seen == [(0, 3, True, False)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(pf.InputError, match=r"expected num_refreshes=1 .* got 0"):
        pf.train(net, data.fit, steps=6, batch_size=2, run=run, stage="train")


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from pfnas_fast import train
from pfnas_fast.run.job import open_job, train_sampler
from pfnas_fast.run.refresh import refresh_of
from pfnas_fast.train.distributed import rank_and_size, start_processes

start_processes("cpu")
rank, _ = rank_and_size()
measured = []
job = open_job(sys.argv[1])
job.progress = lambda stage, done, total, info: measured.append(stage)
net, sampler = job.load_net("warmup"), train_sampler(job)
settings = {"batch_size": 2, "steps": 4, "checkpoint_every": 100, "stage": "train"}
train(net, job.data.fit, sampler=sampler, run=job.run, refresh=refresh_of(job, sampler), **settings)
assert ("refresh" in measured) == (rank == 0)
state = dict(net.named_parameters()) | {"draws": torch.from_numpy(sampler.population_for_step(0, 0, 50))}
torch.save(state, f"{sys.argv[1]}/rank{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_go_on_with_the_same_filter(pruned_run: Path, tmp_path: Path) -> None:
    job = _copy(pruned_run, tmp_path / "run")
    script = tmp_path / "program.py"
    script.write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=127.0.0.1:0", str(script), str(job.run.folder)]
    subprocess.run(launcher, check=True, capture_output=True, timeout=300)
    first, second = (torch.load(job.run.folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    old = train_sampler(job).bind(job.cost).population_for_step(0, 0, 50)
    assert (first["draws"].numpy() != old).any()
