"""Running an engine's generator inside a node: its progress on the node, and ComfyUI's Cancel."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger(__name__)
Event = TypeVar("Event")
Result = TypeVar("Result")

PREVIEW_PIXELS = 512
UPDATES = 10        # a second at most: each one is a message to every browser


def drive(work: Generator[Event, None, Result], show: Callable[[Event], None]) -> Result:
    """Runs `work` to its end, gives `show` each event, and returns what it returns.

    Cancel is looked for between events. It closes the generator, which saves what can be gone on with, and then raises ComfyUI's own
    exception, so that the node counts as cancelled and not as failed. Nodes run in inference mode, which the engine must not.
    """
    with torch.inference_mode(False), closing(work):
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                event = next(work)
            except StopIteration as end:
                return end.value
            show(event)


class Bar:
    """The progress bar of one node; each stage fills it once, and its name goes to the log."""

    def __init__(self, node_id: str | None) -> None:
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._stage, self._shown = "", 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            log.info("WanLite: %s", stage)
        if stage != self._stage or done >= total or time.monotonic() - self._shown > 1 / UPDATES:
            self._bar.update_absolute(done, max(1, total))
            self._stage, self._shown = stage, time.monotonic()

    def preview(self, frame: Tensor) -> None:
        """Shows a picture [H, W, 3] in 0..1 on the node."""
        picture = Image.fromarray((frame.clamp(0, 1) * 255).byte().cpu().numpy())
        self._bar.update_absolute(self._bar.current, self._bar.total, ("JPEG", picture, PREVIEW_PIXELS))
