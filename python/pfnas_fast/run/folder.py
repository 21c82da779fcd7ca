# SPDX-License-Identifier: Apache-2.0
"""A run folder: what a run wrote, what it still has to do, and how it goes on after a crash."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import torch
import yaml

from pfnas_fast.errors import InputError
from pfnas_fast.run.config import RunConfig, load_config

# Settings that change neither the result nor its meaning, so a resumed run may change them.
_FREE_SETTINGS = ("device", "num_workers", "checkpoint_every")


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
        if config is not None:
            self._agree_with_config(config)

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

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to `log.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        with self.path("log.jsonl").open("a") as file:
            file.write(line + "\n")

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
        with self.atomic(name) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n")

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

    def _agree_with_config(self, config: RunConfig) -> None:
        file = self.folder / "config.yaml"
        if file.exists():
            old = load_config(file).to_dict()
            for key, value in config.to_dict().items():
                if old[key] != value and key not in _FREE_SETTINGS:
                    raise InputError(
                        f"Run: expected {key}={old[key]!r} (the run in {self.folder} was started with it), "
                        f"got {value!r}; choose another --out for another run"
                    )
            return
        with self.atomic("config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


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
    "pareto.json": "search",
    "report.json": "report",
}
