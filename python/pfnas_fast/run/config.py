# SPDX-License-Identifier: Apache-2.0
"""Everything that decides the result of a run, in one frozen, printable object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as FilePath
from typing import Any, get_args, get_type_hints

import yaml

from pfnas_fast.errors import InputError

SCHEDULES = ("sandwich", "progressive", "single")
SAMPLERS = ("uniform", "balanced", "bestup", "random_prune", "filter_unconditioned", "path_filter")
LABELLINGS = ("stratified", "active")
OPTIMIZERS = ("sgd", "adamw")
RATE_CURVES = ("stages", "joint")
BACKENDS = ("fast", "reference")
DEVICES = ("cpu", "cuda")
PRESETS: dict[str, dict[str, Any]] = {
    # Once-for-All as published (arXiv:1908.09791): progressive shrinking, uniform paths, one frozen teacher.
    "ofa": {"schedule": "progressive", "sampler": "uniform"},
}

# Settings that only the search and what comes after it read: training, labels and filter do not depend on
# them.
SEARCH_SETTINGS = (
    "max_macs_m",
    "search_resolution",
    "search_iterations",
    "search_flood",
    "num_budgets",
    "candidates_per_budget",
    "random_paths",
    "report_budgets",
    "finetune_steps",
)
_MIN_LABELS = 10  # what `filter.report.filter_report` needs for its folds


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run; steps, never seconds, so that a run can be repeated and resumed exactly.

    `train_steps` and `warmup_steps` are counted in sandwich steps (largest + smallest + two free paths).
    Another schedule gets as many steps of its own as cost the same multiply-accumulates
    (`train.schedules.equal_compute_steps`).
    """

    # What is trained on what.
    data: str = "digits"
    pretrain_data: str = "digits"
    space: str = "tiny"
    backend: str = "fast"
    device: str = "cpu"
    seed: int = 0
    # Roles of images (docs/method.md).
    label_fraction: float = 0.2
    calib_images: int = 128
    train_fraction: float = 1.0
    # How paths are trained, and which.
    schedule: str = "sandwich"
    sampler: str = "path_filter"
    keep: float = 0.3
    epsilon: float = 0.1
    force_filter: bool = False
    # S0: classification.
    pretrain: bool = True
    pretrain_steps: int = 800
    pretrain_batch_size: int = 24
    pretrain_optimizer: str = "sgd"
    pretrain_learning_rate: float = 0.1
    pretrain_weight_decay: float = 3e-5
    # S2 and S6: detection.
    warmup_steps: int = 900
    train_steps: int = 1800
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-2
    rate_curve: str = "stages"  # S2 and S6 each have one, and start to distil anew; "joint": one over both
    weight_decay: float = 0.02
    distill_after: float = 0.2
    distill_weight: float = 1.0
    ema_decay: float = 0.995
    hflip: bool = True
    vflip: bool = False
    num_workers: int = 0
    checkpoint_every: int = 100
    # S3 to S5: labels and filter.
    num_bins: int = 8
    labels_per_bin: int = 16
    filter_members: int = 5
    labelling: str = "stratified"  # "active": half of them where a filter of the other half knows least
    filter_refreshes: int = 1  # of S3 to S5 in mid-S6, evenly spaced; may accept a filter that S4 refused
    # S7, S8 and the report.
    num_budgets: int = 8
    max_macs_m: float | None = None
    search_resolution: int | None = None
    search_iterations: int = 200
    search_flood: int = 100_000  # exact samples per budget before the evolution; 0 = none
    candidates_per_budget: int = 5
    random_paths: int = 20
    report_budgets: int = 3
    finetune_steps: int = 0

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("rate_curve", self.rate_curve, RATE_CURVES)
        _check_choice("labelling", self.labelling, LABELLINGS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("pretrain_optimizer", self.pretrain_optimizer, OPTIMIZERS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("device", self.device, DEVICES)
        if self.device == "cuda" and self.backend == "fast":
            raise InputError(
                "config: expected backend 'reference' for device 'cuda' (the kernels of 'fast' run on CPUs), "
                "got 'fast'"
            )
        for name in ("label_fraction", "train_fraction", "keep"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise InputError(f"config: expected a fraction in (0, 1] for {name}, got {value!r}")
        if self.label_fraction > 0.8:
            raise InputError(f"config: expected at most 0.8 for label_fraction, got {self.label_fraction!r}")
        if not 0.0 <= self.epsilon <= 1.0:
            raise InputError(f"config: expected a probability in [0, 1] for epsilon, got {self.epsilon!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"config: expected at least 1 for {name}, got {getattr(self, name)!r}")
        for name in ("pretrain_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"config: expected a positive number for {name}, got {getattr(self, name)!r}"
                )
        for name in ("seed", "finetune_steps", "num_workers", "search_flood", "filter_refreshes"):
            if getattr(self, name) < 0:
                raise InputError(f"config: expected at least 0 for {name}, got {getattr(self, name)!r}")
        if self.batch_size < 2:  # batch statistics of one image are none
            raise InputError(f"config: expected at least 2 for batch_size, got {self.batch_size!r}")
        if self.num_bins * self.labels_per_bin < _MIN_LABELS:
            raise InputError(
                f"config: expected at least {_MIN_LABELS} for num_bins x labels_per_bin (the filter's report "
                f"needs that many paths), got {self.num_bins} x {self.labels_per_bin}"
            )

        if self.labelling == "active" and self.labels_per_bin < 2:
            raise InputError(
                "config: expected at least 2 for labels_per_bin with labelling 'active' (half of them are "
                f"drawn, the others chosen), got {self.labels_per_bin!r}"
            )

    @property
    def uses_filter(self) -> bool:
        """Whether training after the warm-up is steered by a filter (so labels come before S6, not after)."""
        return self.sampler in ("path_filter", "filter_unconditioned", "bestup")

    @property
    def joins_rate_curves(self) -> bool:
        """Whether S6 goes on where the warm-up left the learning rate; phases keep curves of their own."""
        return self.uses_filter and self.rate_curve == "joint" and self.schedule != "progressive"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_AT_LEAST_ONE = (
    "calib_images",
    "pretrain_steps",
    "pretrain_batch_size",
    "warmup_steps",
    "train_steps",
    "num_bins",
    "labels_per_bin",
    "filter_members",
    "num_budgets",
    "search_iterations",
    "candidates_per_budget",
    "random_paths",
    "report_budgets",
    "checkpoint_every",
)


def make_config(
    *,
    recipe: str = "default",
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> RunConfig:
    """Put a configuration together: recipe, then preset, then named options, then `key=value` assignments.

    Args:
        recipe: A shipped recipe (`default`, `demo`, `voc`, `coco`) or a YAML file of `RunConfig` fields.
        preset: `"ofa"` or None.
        overrides: Field values; None values are passed over.
        assignments: Texts `key=value` with a YAML value, as given to `--set`.

    Raises:
        InputError: unknown recipe, preset or field, or a value of the wrong type or out of range.

    Example:
        >>> make_config(recipe="demo", assignments=["train_steps=10"]).train_steps
        10
    """
    values = _read_recipe(recipe)
    if preset is not None:
        _check_choice("preset", preset, tuple(PRESETS))
        values.update(PRESETS[preset])
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    for text in assignments or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"config: expected key=value for --set, got {text!r}")
        values[key.strip()] = _parse_yaml(value, f"--set {key.strip()}")
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Check names and types of `values` and build the configuration."""
    hints = get_type_hints(RunConfig)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"config: expected one of {', '.join(sorted(hints))} for a setting, got {key!r}")
        checked[key] = _convert(key, value, hints[key])
    return RunConfig(**checked)


def load_config(file: FilePath) -> RunConfig:
    """Read a `config.yaml` that a run wrote; runs of versions without a refresh have none."""
    return config_from_dict({"filter_refreshes": 0, **_read_mapping(file.read_text(), str(file))})


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("pfnas_fast.run") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        text = (resources.files("pfnas_fast.run") / "recipes" / f"{recipe}.yaml").read_text()
    elif FilePath(recipe).is_file():
        text = FilePath(recipe).read_text()
    else:
        raise InputError(
            f"config: expected one of {', '.join(recipe_names())} or a YAML file for recipe, got {recipe!r}"
        )
    return _read_mapping(text, f"recipe {recipe!r}")


def _read_mapping(text: str, source: str) -> dict[str, Any]:
    values = _parse_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config: expected a mapping of settings in {source}, got {type(values).__name__}")
    return values


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config: expected YAML in {source}, got {text[:40]!r}: {reason}") from error


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Accept exactly the declared type; an int is a fine float, and a YAML float such as 1e-3 may arrive as
    text."""
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif type(value) in allowed:
        return value
    names = " or ".join(item.__name__ for item in allowed if item is not type(None))
    raise InputError(f"config: expected {names} for {key}, got {value!r}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"config: expected one of {', '.join(allowed)} for {name}, got {value!r}")
