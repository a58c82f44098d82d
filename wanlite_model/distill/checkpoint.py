"""A run on disk: what it is, how far it came, its complete state, and its best weights so far. Private to this machine."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import WanLiteError
from ..files import read_json, replace_file, sweep, write_json
from ..formats.container import Writer
from ..transformer import WanLiteStudent
from .adapters import Adapters
from .job import DistillJob, differences
from .optim import WeightAverage

MOMENTS = ("exp_avg", "exp_avg_sq", "step")     # AdamW keeps these for each weight, Muon the first and the last


@dataclass
class TrainState:
    """What training changes. `step` counts finished optimizer steps.

    trained: the parameters that move, by name: all of the student's, or its adapters' over a frozen student, and a critic's.
    """
    student: WanLiteStudent
    trained: Mapping[str, nn.Parameter]
    average: WeightAverage
    optimizer: torch.optim.AdamW
    step: int = 0
    best_error: float = float("inf")
    best_step: int = 0
    adapters: Adapters | None = None
    critic: Adapters | None = None


class RunFolder:
    """`<folder>/job.json, plan.json, metrics.jsonl, checkpoint.safetensors, best.safetensors, student/ or lora.safetensors, finished.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint, self.best, self.student = path / "checkpoint.safetensors", path / "best.safetensors", path / "student"
        self.lora = path / "lora.safetensors"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def opened(self, job: DistillJob, about: Mapping[str, Any]) -> Iterator[None]:
        """Takes the run for this process. Raises WanLiteError when it is another job's, or in use; then nothing was changed."""
        self._compare(job)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise WanLiteError(f"Run {self.path.name!r} is in use by another job.", "", "Wait for it, or type a new run name.") from error
        try:
            self._compare(job)
            sweep(self.path)
            write_json(self.path / "job.json", {"job": job.to_json(), "about": dict(about)})
            yield
        finally:
            lock.release()

    def _compare(self, job: DistillJob) -> None:
        if not (self.path / "job.json").exists():
            return
        try:
            old = DistillJob.from_json(read_json(self.path / "job.json")["job"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise WanLiteError(f"Run {self.path.name!r} has a damaged job.json.", "", "Type a new run name; nothing was overwritten.") from error
        if changed := differences(old, job):
            raise WanLiteError(f"Run {self.path.name!r} was made with {', '.join(changed)}.", "",
                               "Restore these values to continue it, or type a new run name to start from step 0. Nothing was overwritten.")

    def note(self, name: str, value: Any) -> None:
        """Remembers a small fact of the run (its plan, its baseline, its end)."""
        write_json(self.path / f"{name}.json", value)

    def noted(self, name: str) -> Any:
        """What was noted, or None. Raises WanLiteError when it cannot be read."""
        path = self.path / f"{name}.json"
        try:
            return read_json(path) if path.exists() else None
        except json.JSONDecodeError as error:
            raise WanLiteError(f"Run {self.path.name!r} has a damaged {path.name}.", "", "Type a new run name; nothing was overwritten.") from error

    def log(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The logged lines of one kind, in order; a line torn by a power cut is passed over."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in found if row["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drops what was logged after the step that training goes on from."""
        kept = [row for kind in ("step", "eval") for row in self.rows(kind) if row["step"] <= step]
        replace_file(self.metrics, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"))

    def save(self, state: TrainState) -> int:
        """Writes the complete state, at once; returns its bytes."""
        tensors = {f"student.{name}": parameter.detach() for name, parameter in state.trained.items()}
        tensors |= {f"average.{name}": value for name, value in state.average.values.items()}
        for name, parameter in state.trained.items():
            tensors |= {f"{key}.{name}": value for key, value in state.optimizer.state[parameter].items()}
        _write(self.checkpoint, tensors, {"wanlite.state": json.dumps({"step": state.step})})
        return self.checkpoint.stat().st_size

    def restore(self, state: TrainState) -> bool:
        """Puts the saved state into `state`; False when there is none. A damaged file is an error, never a silent restart."""
        if not self.checkpoint.exists():
            return False
        try:
            with safe_open(self.checkpoint, "pt") as stored:
                told, names = json.loads(stored.metadata()["wanlite.state"]), set(stored.keys())
                for name, parameter in state.trained.items():
                    parameter.data.copy_(stored.get_tensor(f"student.{name}"))
                    if name in state.average.values:
                        state.average.values[name].copy_(stored.get_tensor(f"average.{name}"))
                    # Copies: what stays a view would keep the file mapped, and Windows then refuses to replace it.
                    moments = {key: stored.get_tensor(f"{key}.{name}").clone() for key in MOMENTS if f"{key}.{name}" in names}
                    state.optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device)
                                                        for key, value in moments.items()}
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise WanLiteError(f"The checkpoint of run {self.path.name!r} is damaged ({error}).", "",
                               "Type a new run name to start again; the teacher's cached answers are used again.") from error
        state.step = told["step"]
        return True

    def restore_best(self, state: TrainState) -> None:
        """Reads which weights are the best so far from their own file: it may be newer than the checkpoint."""
        if self.best.exists():
            with safe_open(self.best, "pt") as stored:
                told = json.loads(stored.metadata()["wanlite.best"])
            state.best_error, state.best_step = told["error"], told["step"]

    def save_best(self, state: TrainState) -> None:
        """Keeps the averaged weights in bf16: what is handed out."""
        told = {"error": state.best_error, "step": state.best_step}
        _write(self.best, state.average.values, {"wanlite.best": json.dumps(told)}, torch.bfloat16)

    def load_best(self) -> dict[str, Tensor]:
        """The best weights so far, as copies: the file is not held."""
        return {name: value.clone() for name, value in load_file(self.best).items()}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype | None = None) -> None:
    """Streams the tensors from wherever they are: of what lies on a GPU, never more than a piece is in memory too."""
    def write(temporary: Path) -> None:
        with Writer(temporary, {name: tuple(value.shape) for name, value in tensors.items()}, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, value, dtype)
            writer.finish()
    replace_file(path, write)
