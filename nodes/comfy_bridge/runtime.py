"""Running an engine's generator inside a node: its progress on the node, ComfyUI's Cancel, and the end of the process."""
from __future__ import annotations

import atexit
import io
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...wanlite_model.awake import awake
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.files import replace_file
from . import memory
from .here import running_server
from .live import Live

log = logging.getLogger(__name__)
Event = TypeVar("Event")
Result = TypeVar("Result")

LIVE = "wanlite.live"       # the message that shows a run on its node
BAR_EVERY, LIVE_EVERY = 1.0, 0.5        # seconds at least: a bar's update is two messages to the browser, so that these are no more than four a second
CLIP_PIXELS, CLIP_FPS, GAP = 320, 16, 4         # a clip's longer side at most, its frames a second, and pixels between teacher and student
DEADLY = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))     # end a process at once


def drive(work: Generator[Event, None, Result], show: Callable[[Event], None], leaving: Callable[[], None] = lambda: None) -> Result:
    """Runs `work` to its end, gives `show` each event, and returns what it returns. leaving: called before `work` is closed early.

    Cancel, and the end of the process, are looked for between events. Both close the generator, which saves what can be gone on with, and
    then raise ComfyUI's own exception, so that the node counts as cancelled and not as failed. Nodes run in inference mode, which the
    engine must not. The computer stays awake meanwhile.
    """
    with torch.inference_mode(False), EndHeldBack() as held, awake("A job runs in ComfyUI"), closing(work):
        while True:
            if held.wanted or comfy.model_management.processing_interrupted():
                leaving()
                comfy.model_management.throw_exception_if_processing_interrupted()
                raise comfy.model_management.InterruptProcessingException
            try:
                event = next(work)
            except StopIteration as end:
                return end.value
            show(event)


class EndHeldBack:
    """While inside, the end of the process waits until this is left; `wanted` tells that it does.

    Nodes run in a daemon thread. On Ctrl-C ComfyUI's main thread leaves its loop, and Python then stops such threads wherever they are; a
    deadly signal stops all threads at once. The second Ctrl-C or signal does not wait.
    """

    def __init__(self) -> None:
        self._exiting, self._left = threading.Event(), threading.Event()
        self._caught: list[int] = []    # no event: a handler may run while this very thread holds an event's lock

    @property
    def wanted(self) -> bool:
        return self._exiting.is_set() or bool(self._caught)

    def __enter__(self) -> EndHeldBack:
        atexit.register(self._wait)
        _in_servers_thread(self._take_signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._exiting.is_set():
            threading.Event().wait()        # for good: Python aborts when it ends while such a thread is in torch's code
        atexit.unregister(self._wait)
        _in_servers_thread(self._give_signals_back)
        if self._caught:
            signal.raise_signal(self._caught[0])

    def _wait(self) -> None:
        self._exiting.set()
        log.info("WanLite: saving the job before ComfyUI ends. Ctrl-C again ends it at once, without what was done since the last save.")
        with suppress(KeyboardInterrupt):
            while not self._left.wait(0.5):     # in pieces: on Windows Ctrl-C comes through between waits only
                pass

    def _take_signals(self) -> None:
        """Those that something else handles, or that are ignored as under nohup, are left alone."""
        for number in DEADLY:
            if signal.getsignal(number) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
                signal.signal(number, self._catch)

    def _give_signals_back(self) -> None:
        for number in DEADLY:
            if signal.getsignal(number) == self._catch:
                signal.signal(number, signal.SIG_DFL)

    def _catch(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._caught.append(number)
        if self._left.is_set():         # it came too late for __exit__ to see it
            signal.raise_signal(number)


def _in_servers_thread(function: Callable[[], None]) -> None:
    """Only the main thread may set signal handlers, and there the server's loop runs. Without a server nothing is done."""
    server = running_server()
    if server is not None:
        server.loop.call_soon_threadsafe(function)


class Pace:
    """Whether it is time again."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, -math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Bar:
    """The progress bar of one node; each stage fills it once, and its name goes to the log."""

    def __init__(self, node_id: str | None) -> None:
        self._node_id, self._stage, self._due = node_id, "", Pace(BAR_EVERY)

    def show(self, stage: str, done: int, total: int) -> None:
        """With a ProgressBar of its own each time: newer ComfyUIs hold the second update of one back until its count has grown by half a percent,
        which can be minutes of training, and much longer where the stage before had more steps.
        """
        if stage != self._stage:
            log.info("WanLite: %s", stage)
            self._stage = stage
        if self._due():
            comfy.utils.ProgressBar(max(1, total), node_id=self._node_id).update_absolute(done, max(1, total))


class Board:
    """Tells every page what a run is at: one that was opened since the job was queued too."""

    def __init__(self, live: Live) -> None:
        self._live, self._due = live, Pace(LIVE_EVERY)

    def show(self, event: Event) -> None:
        self._live.take(event)
        if self._due():
            self.send()

    def tell(self, told: str) -> None:
        log.info("WanLite: %s", told)
        self._live.tell(told)
        self.send()

    def send(self) -> None:
        """A job does not end because a page cannot be told of it: on a device that has failed, asking for its memory fails too."""
        server = running_server()
        try:
            if server is not None:
                server.send_sync(LIVE, self._live.shown(memory.usage()))
        except Exception as error:
            log.debug("WanLite: the page was not told (%s: %s).", type(error).__name__, error)


def small(clip: Tensor) -> list[Image.Image]:
    """The frames of a clip [T, H, W, 3] in 0..1, as small as they are shown."""
    pictures = [_picture(frame) for frame in clip]
    for picture in pictures:
        picture.thumbnail((CLIP_PIXELS, CLIP_PIXELS))
    return pictures


def keep_clip(clips: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Writes clips of one size and length side by side, as one that moves; a disk that refuses it does not end the job."""
    frames = [_beside(pictures) for pictures in zip(*clips)]
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda file: frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:], duration=1000 // CLIP_FPS, loop=0))
    except (OSError, WanLiteError) as error:
        log.warning("WanLite: %s could not be written (%s).", path.name, error)


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    whole = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place * (width + GAP), 0))
    return whole


def png(frame: Tensor) -> bytes:
    """A picture [H, W, 3] in 0..1 as a PNG file, without a word about where it comes from."""
    file = io.BytesIO()
    _picture(frame).save(file, format="PNG")
    return file.getvalue()


def _picture(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).byte().cpu().numpy())
