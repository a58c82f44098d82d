"""A run on disk: what it is, how far it came, its complete state, and its best weights so far. Private to this machine."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import WanLiteError
from ..files import read_json, replace_file, sweep, write_json
from ..formats.container import Writer, read_header
from ..transformer import WanLiteStudent
from .adapters import Adapters
from .job import DistillJob, differences
from .optim import Released, WeightAverage, adapted

WEIGHTS = ("student", "average")        # of the names in a checkpoint; the others are an optimizer's


@dataclass
class TrainState:
    """What training changes. `step` counts finished optimizer steps.

    trained: the parameters that move, by name: all of the student's, or its adapters' over a frozen student, and a critic's. released: where they move
    within backward.
    """
    student: WanLiteStudent
    trained: Mapping[str, nn.Parameter]
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_error: float = float("inf")
    best_step: int = 0
    adapters: Adapters | None = None
    critic: Adapters | None = None
    released: Released | None = None


class RunFolder:
    """What a run keeps.

    job.json: the job as it was asked for last, and what was found out and decided since (its legs, its baseline, its end). What it is made
    from: prompts.safetensors, latents.safetensors, start_from.safetensors. How far it is: metrics.jsonl, checkpoint.safetensors (all that
    training changes), best.safetensors (bf16). What it ended with: student-<step>/ or lora-<step>.safetensors: a run can end more than once,
    and the student it handed out before may still be in use.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.job = path, path / "job.json"
        self.checkpoint, self.best, self.metrics = path / "checkpoint.safetensors", path / "best.safetensors", path / "metrics.jsonl"

    def student(self, step: int) -> Path:
        return self.path / f"student-{step}"

    def lora(self, step: int) -> Path:
        return self.path / f"lora-{step}.safetensors"

    @contextmanager
    def opened(self, job: DistillJob) -> Iterator[None]:
        """Takes the run for this process, until it ends. Raises WanLiteError when it is another job's, or in use; then nothing was changed."""
        self._compare(job)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise WanLiteError(f"Run {self.path.name!r} is in use by another job.", "", "Wait for it, or type a new run name.") from error
        except OSError as error:
            raise WanLiteError(f"The folder of run {self.path.name!r} cannot be written ({error}).", "A run keeps its state there.",
                               "Make it writable, or choose another place for runs.") from error
        try:
            self._compare(job)
            sweep(self.path)
            self.note("job", job.to_json())
            yield
        finally:
            lock.release()

    def _compare(self, job: DistillJob) -> None:
        told = self.noted("job")
        if told is not None and (changed := differences(DistillJob.from_json(told), job)):
            raise WanLiteError(f"Run {self.path.name!r} was made with {', '.join(changed)}.", "",
                               "Restore these values to continue it, or type a new run name to start from step 0. Nothing was overwritten.")

    def note(self, name: str, value: Any, **others: Any) -> None:
        """Remembers facts of the run in job.json, in place of what was noted under these names before."""
        write_json(self.job, {**self.notes(), name: value, **others})

    def noted(self, name: str) -> Any:
        """What was noted, or None. Raises WanLiteError when job.json cannot be read."""
        return self.notes().get(name)

    def notes(self) -> dict[str, Any]:
        """All that was noted, by name. Raises WanLiteError when job.json cannot be read."""
        try:
            notes = read_json(self.job) if self.job.exists() else {}
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if not isinstance(notes, dict):
            raise self._damaged()
        return notes

    def _damaged(self) -> WanLiteError:
        return WanLiteError(f"Run {self.path.name!r} has a damaged job.json.", "", "Type a new run name; nothing was overwritten.")

    def log(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, *kinds: str) -> list[dict[str, Any]]:
        """The logged lines of these kinds, in order; a line torn by a power cut is passed over."""
        if not self.metrics.is_file():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
        return [row for row in found if isinstance(row, dict) and row.get("kind") in kinds]

    def forget_after(self, step: int) -> None:
        """Drops what was logged after the step that training goes on from."""
        kept = [row for kind in ("step", "eval") for row in self.rows(kind) if row["step"] <= step]
        replace_file(self.metrics, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"))

    def save(self, state: TrainState) -> int:
        """Writes the complete state, at once; returns its bytes."""
        _write(self.checkpoint, _state_tensors(state), {"wanlite.state": json.dumps({"step": state.step})})
        return self.checkpoint.stat().st_size

    def restore(self, state: TrainState) -> bool:
        """Puts the saved state into `state`; False when there is none. A damaged file is an error, never a silent restart."""
        if not self.checkpoint.exists():
            return False
        try:
            with safe_open(self.checkpoint, "pt") as stored:
                told, moments = json.loads(stored.metadata()["wanlite.state"]), _moments_of(stored.keys())
                for name, parameter in state.trained.items():
                    parameter.data.copy_(stored.get_tensor(f"student.{name}"))
                    if name in state.average.values:
                        state.average.values[name].copy_(stored.get_tensor(f"average.{name}"))
                    # Copies: what stays a view would keep the file mapped, and Windows then refuses to replace it.
                    found = {key: stored.get_tensor(f"{key}.{name}").clone() for key in moments.get(name, ())}
                    state.optimizer.state[parameter] = _on(parameter.device, adapted(state.optimizer, parameter, found))
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

    def best_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The best weights so far, in the order in which they lie, one at a time and as copies: the file is held no longer than that."""
        entries = read_header(self.best).entries
        with safe_open(self.best, "pt") as stored:
            for name in sorted(entries, key=lambda name: entries[name].start):
                yield name, stored.get_tensor(name).clone()


def size_of(state: TrainState) -> int:
    """Bytes that a checkpoint of it takes."""
    return sum(value.numel() * value.element_size() for value in _state_tensors(state).values())


def _moments_of(names: Iterable[str]) -> dict[str, list[str]]:
    """{parameter: what an optimizer keeps of it} of the names in a checkpoint."""
    found: dict[str, list[str]] = {}
    for key, _, parameter in (name.partition(".") for name in names):
        if key not in WEIGHTS:
            found.setdefault(parameter, []).append(key)
    return found


def _on(device: torch.device, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value if key == "step" else value.to(device) for key, value in moments.items()}


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"student.{name}": parameter.detach() for name, parameter in state.trained.items()}
    tensors |= {f"average.{name}": value for name, value in state.average.values.items()}
    for name, parameter in state.trained.items():
        tensors |= {f"{key}.{name}": value for key, value in state.optimizer.state[parameter].items()}
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype | None = None) -> None:
    """Streams the tensors from wherever they are: of what lies on a GPU, never more than a piece is in memory too."""
    def write(temporary: Path) -> None:
        with Writer(temporary, {name: tuple(value.shape) for name, value in tensors.items()}, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, value, dtype)
            writer.finish()
    replace_file(path, write)
