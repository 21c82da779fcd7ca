# SPDX-License-Identifier: Apache-2.0
"""Commands over one run folder; all logic is in the library."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Annotated, Any

import typer

from pfnas_fast.cli.console import StageProgress, console, print_comparison, print_report, print_system
from pfnas_fast.errors import InputError
from pfnas_fast.run.config import RunConfig, load_config, make_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a supernet of detectors on your images and search it for one detector per compute budget.",
)

Out = Annotated[
    FilePath, typer.Option("--out", help="Run folder: everything is written there, and resumed from there.")
]
Data = Annotated[
    str | None, typer.Option("--data", help="Detection images: a COCO or VOCdevkit folder, or 'digits'.")
]
PretrainData = Annotated[
    str | None, typer.Option("--pretrain-data", help="Classification images (ImageFolder), or 'digits'.")
]
SpaceName = Annotated[
    str | None, typer.Option("--space", help="Search space: tiny, ofa_mbv3_w1.0 or a YAML file.")
]
Recipe = Annotated[
    str, typer.Option("--recipe", help="default, demo, voc, coco, or a YAML file of settings.")
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="'ofa' = progressive schedule, uniform sampler.")
]
Schedule = Annotated[str | None, typer.Option("--schedule", help="sandwich, progressive or single.")]
SamplerName = Annotated[
    str | None,
    typer.Option(
        "--sampler", help="uniform, balanced, bestup, random_prune, filter_unconditioned or path_filter."
    ),
]
NoPretrain = Annotated[bool, typer.Option("--no-pretrain", help="Start detection from random weights.")]
TrainFraction = Annotated[
    float | None, typer.Option("--train-fraction", help="Use this share of the training images.")
]
ForceFilter = Annotated[
    bool, typer.Option("--force-filter", help="Use the filter even if it ranks no better than MACs.")
]
Backend = Annotated[str | None, typer.Option("--backend", help="fast or reference (pure PyTorch).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Start of all randomness.")]
MaxMacs = Annotated[
    float | None, typer.Option("--max-macs-m", help="Largest budget, millions of MACs of the whole detector.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting: key=value (see config.yaml of a run).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and check the settings; load and write nothing.")
]


@app.command()
def run(
    data: Data = None,
    pretrain_data: PretrainData = None,
    space: SpaceName = None,
    out: Out = FilePath("runs/default"),
    recipe: Recipe = "default",
    preset: Preset = None,
    schedule: Schedule = None,
    sampler: SamplerName = None,
    no_pretrain: NoPretrain = False,
    train_fraction: TrainFraction = None,
    force_filter: ForceFilter = False,
    backend: Backend = None,
    device: Device = None,
    seed: Seed = None,
    max_macs_m: MaxMacs = None,
    assignments: Assignments = None,
    dry_run: DryRun = False,
) -> None:
    """The whole job: pre-train, transfer, warm up, label, filter, prune, train, search, report."""
    overrides = {
        "data": data,
        "pretrain_data": pretrain_data,
        "space": space,
        "schedule": schedule,
        "sampler": sampler,
        "train_fraction": train_fraction,
        "backend": backend,
        "device": device,
        "seed": seed,
        "max_macs_m": max_macs_m,
    }
    config = _configure(out, recipe, preset, overrides, no_pretrain, force_filter, assignments)
    _run_all(out, config, dry_run)


@app.command()
def demo(
    out: Out = FilePath("runs/demo"),
    preset: Preset = None,
    schedule: Schedule = None,
    sampler: SamplerName = None,
    no_pretrain: NoPretrain = False,
    backend: Backend = None,
    seed: Seed = None,
    assignments: Assignments = None,
    dry_run: DryRun = False,
) -> None:
    """The whole job on embedded handwritten digits, within 10 minutes on two CPU cores."""
    overrides = {"schedule": schedule, "sampler": sampler, "backend": backend, "seed": seed}
    config = _configure(out, "demo", preset, overrides, no_pretrain, False, assignments)
    _run_all(out, config, dry_run)


def _stage_command(name: str, text: str) -> None:
    def command(
        out: Out,
        data: Data = None,
        pretrain_data: PretrainData = None,
        space: SpaceName = None,
        recipe: Recipe = "default",
        preset: Preset = None,
        schedule: Schedule = None,
        sampler: SamplerName = None,
        no_pretrain: NoPretrain = False,
        train_fraction: TrainFraction = None,
        force_filter: ForceFilter = False,
        backend: Backend = None,
        device: Device = None,
        seed: Seed = None,
        assignments: Assignments = None,
    ) -> None:
        overrides = {
            "data": data,
            "pretrain_data": pretrain_data,
            "space": space,
            "schedule": schedule,
            "sampler": sampler,
            "train_fraction": train_fraction,
            "backend": backend,
            "device": device,
            "seed": seed,
        }
        _run_stage(
            name, out, _configure(out, recipe, preset, overrides, no_pretrain, force_filter, assignments)
        )

    app.command(name, help=text)(command)


for _name, _text in {
    "pretrain": "S0: train the backbone supernet on classification.",
    "transfer": "S1: put the pre-trained backbone under a fresh neck and head.",
    "warmup": "S2: train the detection supernet over the whole space.",
    "label": "S3: measure paths in every budget bin.",
    "filter": "S4: fit the path filter and report how far it can be trusted.",
    "prune": "S5: the score a path must reach at its budget.",
    "train": "S6: train on what the filter accepts.",
    "report": "Read the test images once and write the report.",
}.items():
    _stage_command(_name, _text)


@app.command()
def search(
    out: Out = FilePath("runs/default"),
    space: SpaceName = None,
    max_macs_m: MaxMacs = None,
    assignments: Assignments = None,
) -> None:
    """S7 and S8: search the trained supernet and export the front."""
    from pfnas_fast.run.plan import check_search_limits
    from pfnas_fast.space import CostModel, load_space

    started = (out / "config.yaml").is_file()
    overrides = {"space": space if started else space or "tiny", "max_macs_m": max_macs_m}
    config = _configure(out, "default", None, overrides, False, False, assignments)
    # Before the data are read for the first time: one class, the cheapest head.
    splits = out / "splits.json"
    num_classes = len(json.loads(splits.read_text())["class_names"]) if splits.is_file() else 1
    check_search_limits(
        config,
        CostModel(load_space(config.space), num_classes=num_classes),
        argument="max_macs_m" if max_macs_m is None else "--max-macs-m",
    )
    if not started:
        raise InputError(
            f"search: expected a trained run in --out, got {str(out)!r}; run `pfnas run --out {out}` first"
        )
    _run_stage("search", out, config)


@app.command()
def compare(
    runs: Annotated[list[FilePath], typer.Argument(help="Finished run folders; the first is the baseline.")],
    png: Annotated[FilePath, typer.Option("--png", help="Plot of the fronts.")] = FilePath("compare.png"),
    json_file: Annotated[FilePath | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Fronts side by side: hypervolume, MACs saved at equal AP, compute spent."""
    from pfnas_fast.report.compare import compare_runs

    comparison = compare_runs(runs, png=png)
    if json_file is not None:
        json_file.write_text(json.dumps(comparison, indent=1) + "\n")
    print_comparison(comparison)


@app.command()
def val(
    model: Annotated[FilePath, typer.Argument(help="An exported detector (best/<macs>m.pt).")],
    data: Annotated[str, typer.Option("--data", help="Detection images.")],
    split: Annotated[str, typer.Option("--split", help="fit, label, select or test.")] = "test",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the roles.")] = 0,
    label_fraction: Annotated[
        float, typer.Option("--label-fraction", help="Share of images of the role label, as in the run.")
    ] = 0.2,
) -> None:
    """The 12 COCO numbers of an exported detector; on Pascal VOC data also VOC's AP50."""
    from pfnas_fast.cli.models import validate

    for name, value in validate(model, data, split, seed, label_fraction).items():
        console.print(f"{name:<12} {value:.4f}", highlight=False)


@app.command()
def predict(
    model: Annotated[FilePath, typer.Argument(help="An exported detector (best/<macs>m.pt).")],
    images: Annotated[list[FilePath], typer.Argument(help="Image files or folders.")],
    out: Annotated[
        FilePath, typer.Option("--out", help="Folder for drawn images and detections.json.")
    ] = FilePath("predictions"),
    threshold: Annotated[float, typer.Option("--threshold", help="Lowest score.")] = 0.3,
) -> None:
    """Detect objects in your images."""
    from pfnas_fast.cli.models import predict_files

    count = predict_files(model, images, out, threshold)
    console.print(f"{count} images written to {out}", highlight=False)


@app.command()
def export(
    model: Annotated[FilePath, typer.Argument(help="A detector of a run (best/<macs>m.pt).")],
    out: Annotated[FilePath, typer.Option("--out", help="Target file, .onnx or .pt2 (torch.export).")],
) -> None:
    """Convert a detector for other runtimes, and verify that it still computes the same."""
    from pfnas_fast.cli.models import export_model

    console.print(export_model(model, out), highlight=False)


@app.command()
def checks() -> None:
    """Versions, instruction sets, OpenMP, CUDA, and what to do if something is missing."""
    from pfnas_fast._system import system_report

    print_system(system_report())


@app.command()
def selftest(
    device: Annotated[str, typer.Option("--device", help="cuda, cuda:1 or cpu.")] = "cuda",
) -> None:
    """Compare every compiled op with its float64 twin on this machine: one verdict per op."""
    from pfnas_fast.selftest import selftest as run_selftest

    verdicts = run_selftest(device)
    for verdict in verdicts:
        state = "ok" if verdict.ok else f"WRONG: {verdict.message}"
        console.print(
            f"{verdict.op:<24} {verdict.dtype:<9} {verdict.cases:>3} cases  "
            f"error {verdict.worst:.2f} of what rounding allows  {state}",
            highlight=False,
            soft_wrap=True,
        )
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


def _configure(
    out: FilePath,
    recipe: str,
    preset: str | None,
    overrides: dict[str, Any],
    no_pretrain: bool,
    force_filter: bool,
    assignments: list[str] | None,
) -> RunConfig:
    """Settings of the call; in a folder that holds a run, its settings, overridden by what was given."""
    from pfnas_fast.run.plan import check_device

    given = dict(overrides)
    if no_pretrain:
        given["pretrain"] = False
    if force_filter:
        given["force_filter"] = True
    stored = out / "config.yaml"
    if stored.is_file() and recipe == "default" and preset is None:
        base = load_config(stored).to_dict()
        base.update({key: value for key, value in given.items() if value is not None})
        given = base
    config = make_config(recipe=recipe, preset=preset, overrides=given, assignments=assignments)
    check_device(config.device)
    return config


def _run_all(out: FilePath, config: RunConfig, dry_run: bool) -> None:
    from pfnas_fast.run.plan import plan_text

    text = plan_text(config)  # refuses what is impossible before anything is loaded
    if dry_run:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    from pfnas_fast.run.job import open_job, run_all
    from pfnas_fast.train.distributed import rank_and_size, start_processes

    start_processes(config.device)
    with StageProgress() as progress:
        job = open_job(out, config, progress)
        run_all(
            job,
            on_stage=lambda name, ran: (
                None if ran else console.print(f"{name}: done before", highlight=False)
            ),
        )
    if rank_and_size()[0] == 0:
        print_report(job.run.read_json("report.json"), str(out))


def _run_stage(name: str, out: FilePath, config: RunConfig) -> None:
    from pfnas_fast.run.job import open_job, run_stage, stage_names
    from pfnas_fast.train.distributed import start_processes

    start_processes(config.device)
    if name not in stage_names(config):
        raise InputError(
            f"{name}: expected one of {', '.join(stage_names(config))} for this run's settings, got {name!r}"
        )
    with StageProgress() as progress:
        ran = run_stage(open_job(out, config, progress), name)
    console.print(f"{name}: {'done' if ran else 'done before'} ({out})", highlight=False)
