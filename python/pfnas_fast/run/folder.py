# SPDX-License-Identifier: Apache-2.0
"""A run folder: what a run wrote, what it still has to do, and how it goes on after a crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import torch
import yaml

from pfnas_fast.errors import InputError
from pfnas_fast.run.config import SEARCH_SETTINGS, RunConfig, load_config

# Settings that change neither the result nor its meaning, so a resumed run may change them.
_FREE_SETTINGS = ("device", "num_workers", "checkpoint_every")
# What a search with other settings writes anew; the trained supernet and its labels stay.
_SEARCH_OUTPUTS = (
    "candidates.csv",
    "search.json",
    "pareto.json",
    "report.json",
    "front_test.csv",
    "random_test.csv",
)


class Run:
    """One run folder. Every file in it is written to a temporary name and renamed, so it is whole or absent.

    Args:
        folder: Created if absent.
        seed: Start of every random stream of this run.
        config: Written to `config.yaml`; an existing one must agree, else the folder holds another run.

    Raises:
        InputError: the folder holds a run with other settings, or with another seed.

    Example:
        >>> import tempfile
        >>> run = Run(tempfile.mkdtemp() + "/run", seed=0)
        >>> run.write_json("pareto.json", [])
        >>> run.read_json("pareto.json")
        []
    """

    def __init__(self, folder: str | FilePath, *, seed: int = 0, config: RunConfig | None = None) -> None:
        self.folder = FilePath(folder)
        self.seed = config.seed if config is not None else seed
        self.config = config
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"Run: expected a folder for out, got the file {str(folder)!r}")
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._names: dict[str, int] = {}
        self._remove_leftovers()
        if config is not None:
            self._agree_with_config(config)
        else:
            self._agree_with_seed()

    @classmethod
    def open(cls, folder: str | FilePath) -> Run:
        """Open an existing run with the settings it was started with."""
        file = FilePath(folder) / "config.yaml"
        if not file.is_file():
            raise InputError(f"Run: expected a run folder (with config.yaml) for out, got {str(folder)!r}")
        return cls(folder, config=load_config(file))

    def path(self, name: str) -> FilePath:
        """The file `name` in this folder; its parent exists afterwards."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def next_name(self, base: str) -> str:
        """A stage name for an unnamed call: base, base-2, base-3, ... in the order of calls."""
        self._names[base] = self._names.get(base, 0) + 1
        return base if self._names[base] == 1 else f"{base}-{self._names[base]}"

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to `log.jsonl`."""
        line = json.dumps(_finite({"time": round(time.time(), 3), "event": event, **fields}), allow_nan=False)
        with self.path("log.jsonl").open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last line short
                    file.write(b"\n")
            file.write(line.encode() + b"\n")

    def read_log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Lines of `log.jsonl`, oldest first; a line that a kill cut short is passed over."""
        file = self.folder / "log.jsonl"
        lines = []
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                entry = json.loads(text)
            except json.JSONDecodeError:
                continue
            if event is None or entry.get("event") == event:
                lines.append(entry)
        return lines

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON; numbers that JSON does not know (NaN, infinity) become null."""
        text = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
        with self.atomic(name) as temporary:
            temporary.write_text(text)

    def read_json(self, name: str) -> Any:
        return json.loads(self.require(name).read_text())

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint of tensors and plain values to `checkpoints/<name>.pt`."""
        with self.atomic(f"checkpoints/{name}.pt") as temporary:
            torch.save(state, temporary)

    def load(self, name: str) -> dict[str, Any]:
        """Read `checkpoints/<name>.pt`; only tensors and plain values are ever unpickled."""
        file = self.require(f"checkpoints/{name}.pt")
        return torch.load(file, map_location="cpu", weights_only=True)

    def has_checkpoint(self, name: str) -> bool:
        return self.has(f"checkpoints/{name}.pt")

    def require(self, name: str) -> FilePath:
        """The file `name`, or an InputError that says which stage writes it."""
        file = self.folder / name
        if not file.exists():
            stage = PRODUCERS.get(name, "run")
            raise InputError(
                f"expected {name} in {self.folder}, got none; run `pfnas {stage} --out {self.folder}` first"
            )
        return file

    @contextmanager
    def atomic(self, name: str) -> Iterator[FilePath]:
        """Give a temporary file that takes the place of `name` when the block ends without an exception."""
        target = self.path(name)
        temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Temporary files of processes that were killed while they wrote."""
        for file in (*self.folder.glob(".*.*.*"), *self.folder.glob("*/.*.*.*")):
            pid = file.name.split(".")[-2]
            if pid.isdigit() and not FilePath(f"/proc/{pid}").exists():
                file.unlink(missing_ok=True)

    def _agree_with_seed(self) -> None:
        if self.has("config.yaml"):
            stored = load_config(self.folder / "config.yaml").seed
        elif self.has("run.json"):
            stored = self.read_json("run.json")["seed"]
        else:
            self.write_json("run.json", {"seed": self.seed})
            return
        if stored != self.seed:
            raise InputError(
                f"Run: expected seed={stored!r} (the run in {self.folder} was started with it), "
                f"got {self.seed!r}"
            )

    def _agree_with_config(self, config: RunConfig) -> None:
        file = self.folder / "config.yaml"
        if file.exists():
            old = load_config(file).to_dict()
            changed = [key for key, value in config.to_dict().items() if old[key] != value]
            for key in changed:
                value = config.to_dict()[key]
                if key not in _FREE_SETTINGS and key not in SEARCH_SETTINGS:
                    raise InputError(
                        f"Run: expected {key}={old[key]!r} (the run in {self.folder} was started with it), "
                        f"got {value!r}; choose another --out for another run"
                    )
            if not changed:
                return
            if any(key in SEARCH_SETTINGS for key in changed):
                for name in _SEARCH_OUTPUTS:
                    (self.folder / name).unlink(missing_ok=True)
        with self.atomic("config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _finite(value: Any) -> Any:
    """The same JSON data with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PRODUCERS = {
    "checkpoints/pretrain.pt": "pretrain",
    "checkpoints/transfer.pt": "transfer",
    "checkpoints/warmup.pt": "warmup",
    "checkpoints/train.pt": "train",
    "labels.csv": "label",
    "labels.json": "label",
    "checkpoints/filter.pt": "filter",
    "filter/report.json": "filter",
    "filter/thresholds.json": "prune",
    "filter/refresh.json": "train",
    "pareto.json": "search",
    "report.json": "report",
}
