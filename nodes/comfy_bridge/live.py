"""What the page shows of a run: its curve and its errors, where it is, and what it takes. Of a job that runs now from its events, of any other run
from its folder: a page that was closed, or a server that was started anew, shows the same again.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...wanlite_model.distill.checkpoint import RunFolder
from ...wanlite_model.distill.clock import Clock
from ...wanlite_model.distill.events import Eval, Event, Finished, Planned, Sample, Stage, Step
from ...wanlite_model.distill.finish import PLAIN_CUT
from ...wanlite_model.distill.job import DistillJob
from ...wanlite_model.errors import WanLiteError

POINTS = 240                    # of the loss curve at most; a message carries all of them, so that one that was lost is no loss


class Curve:
    """A loss by step, as the means of neighbours: never more than POINTS of them."""

    def __init__(self) -> None:
        self._width, self._groups = 1, []           # (sum of steps, sum of losses, how many): whole ones, since another thread may read them

    def add(self, step: int, loss: float) -> None:
        groups = self._groups
        if groups and groups[-1][2] < self._width:
            last = groups[-1]
            groups[-1] = (last[0] + step, last[1] + loss, last[2] + 1)
        else:
            groups.append((step, loss, 1))
        if len(groups) > POINTS:
            self._width *= 2
            self._groups = [tuple(map(sum, zip(*groups[i:i + 2]))) for i in range(0, len(groups), 2)]

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(round(steps / count, 1), _short(losses / count)) for steps, losses, count in list(self._groups)]


class Live:
    """One run as the page is told of it. node: that it runs at, while it does.

    What is in the folder is shown as far as it can be read; whether a job can run with it is the engine's to say.
    """

    def __init__(self, files: RunFolder, node: str | None = None, job: DistillJob | None = None) -> None:
        self._files, self.node, self.running = files, node, node is not None
        self._clock = None if job is None else Clock(job)
        self._stage, self._done, self._of = "", 0, 0
        self._told, self._peak = "", 0
        self.job: Mapping[str, Any] | None = None if job is None else job.to_json()
        self.read()

    def read(self, until: float = math.inf) -> None:
        """What the folder tells of the steps up to this one."""
        curve, errors, at, notes = Curve(), {}, 0, self._notes()
        for kind, step, value in self._rows():
            if kind == "step" and step <= until:
                curve.add(step, value)
                at = step
            elif step <= until:
                errors[step] = value
        self._curve, self._errors, self._step = curve, errors, at
        self._steps = max(at, _number(notes.get("last")) or 0)
        self._plain = _number(_within(notes, "baseline", "plain_cut", "error"))
        self._yardstick = str(_within(notes, "baseline", "yardstick") or PLAIN_CUT)
        ended = _within(notes, "finished", "step") == at
        self._report = str(_within(notes, "finished", "report") or "") if ended else ""
        self.job = self.job or notes.get("job")
        self._beside = not _within(notes, "job", "latents")
        self._clips = clips_of(self._files.path, at)

    def _notes(self) -> dict[str, Any]:
        try:
            return self._files.notes()
        except WanLiteError:
            return {}

    def _rows(self) -> Iterator[tuple[str, int, float]]:
        """(kind, step, its loss or error) of what was logged."""
        try:
            rows = self._files.rows("step", "eval")
        except OSError:
            return
        for row in rows:
            value = _number(row.get("loss" if row["kind"] == "step" else "error"))
            if isinstance(row.get("step"), int) and value is not None:
                yield row["kind"], row["step"], value

    def take(self, event: Event) -> None:
        """Of the job that runs."""
        self._clock.take(event)
        if isinstance(event, Stage):
            self._stage, self._done, self._of, self._report = event.name, event.done, event.total, ""
        elif isinstance(event, Planned):
            self._told = event.told
        elif isinstance(event, Step):
            if event.step != self._step + 1:        # it went on from an earlier one than was logged
                self.read(event.step - 1)
            self._stage, self._done, self._of, self._report = "training", event.step, event.total, ""
            self._step, self._steps = event.step, event.total
            if math.isfinite(event.loss):           # no JSON otherwise
                self._curve.add(event.step, event.loss)
        elif isinstance(event, Eval):
            self._errors, self._plain = {**self._errors, event.step: event.held.error}, _number(event.plain_cut.error)
            self._yardstick = str(_within(self._notes(), "baseline", "yardstick") or self._yardstick)
        elif isinstance(event, Sample):
            self._clips = clips_of(self._files.path, event.step)
        elif isinstance(event, Finished):
            self._report, self.running = event.report, False

    def tell(self, told: str) -> None:
        """A sentence in place of the plan's."""
        self._told = told

    def leave(self) -> None:
        """The job is over, or was stopped."""
        self.running, self._stage = False, ""

    def shown(self, memory: dict[str, int] | None = None) -> dict[str, Any]:
        """As the page takes it: numbers, and sentences of the engine. memory: used and total bytes of the device, and of this process."""
        if memory:
            self._peak = max(self._peak, memory["used"])
        left = self._clock.left if self._clock and self.running else None
        return {"run": self._files.path.name, "node": self.node, "begun": self._files.job.is_file(), "running": self.running,
                "stage": self._stage, "done": self._done, "of": self._of, "step": self._step, "steps": self._steps,
                "left": None if left is None else round(left), "curve": self._curve.points,
                "errors": [(step, _short(error)) for step, error in sorted(self._errors.items()) if math.isfinite(error)],
                "plain_cut": None if self._plain is None else _short(self._plain), "yardstick": self._yardstick,
                "told": self._told, "report": self._report, "clips": self._clips, "beside": self._beside,
                "memory": {**memory, "peak": self._peak} if memory else None}


def clip_path(folder: Path, step: int) -> Path:
    """Where what was drawn after a step of the run in this folder lies: the teacher's clip and the student's, side by side."""
    return folder / "samples" / f"step-{step}.webp"


def clips_of(folder: Path, until: float) -> list[tuple[int, int]]:
    """(step, when it was written) of the clips that were drawn after steps up to this one, in order: a run that is begun anew draws them anew."""
    found = []
    for path in folder.glob("samples/*"):
        match = re.fullmatch(r"step-(\d+)\.webp", path.name)
        if match and int(match[1]) <= until:
            with suppress(OSError):                 # gone meanwhile
                found.append((int(match[1]), path.stat().st_mtime_ns // 1_000_000))
    return sorted(found)


def _within(notes: Any, *names: str) -> Any:
    """What lies at this place of nested notes, or None."""
    for name in names:
        notes = notes.get(name) if isinstance(notes, Mapping) else None
    return notes


def _number(value: Any) -> float | None:
    """A number that JSON has, or None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
