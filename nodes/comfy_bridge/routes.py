"""ComfyUI's server: what a browser can ask of it beside its own routes. ComfyUI imports this when it starts: the engine is imported where it is asked for."""
from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ...wanlite_model.errors import WanLiteError
from . import folders, jobs
from .here import running_server

if TYPE_CHECKING:
    from .live import Live

FINISH = "/wanlite/finish"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes() -> None:
    """To be called while ComfyUI loads its packs: afterwards the server takes no more. A second copy of the pack must not add them again,
    since a server with two routes of one name does not start.
    """
    server = running_server()
    if server is None or any(route.path == FINISH for route in server.routes):
        return
    server.routes.post(FINISH)(finish)
    server.routes.get("/wanlite/run")(told(run))
    server.routes.get("/wanlite/clip")(told(clip))
    server.routes.get("/wanlite/disk")(told(disk))
    server.routes.post("/wanlite/disk/clear")(told(clear))


def told(handler: Handler) -> Handler:
    """The same, with what a WanLiteError says as the answer."""
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except WanLiteError as error:
            return web.json_response({"error": str(error)}, status=400)
    return answer


async def finish(request: web.Request) -> web.Response:
    """{"run": name} asks the job that trains this run to end with its best student so far; 404 when none does."""
    name = (await request.json())["run"]
    if jobs.finish(name):
        return web.json_response({"finishing": True})
    return web.json_response({"error": f"No WanLite Distill is training run {name!r} now, so there is nothing to finish. "
                                       "Before its first step, Cancel stops it and keeps what it has done."}, status=404)


async def run(request: web.Request) -> web.Response:
    """?run=name, or ?node=12&node=3:12 for whichever run works at one of these nodes now: what live.Live tells of it, and where it lies."""
    name = request.query.get("run") or jobs.run_at(request.query.getall("node", []))
    if name is None:
        return web.json_response({"run": None})
    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, _looked_at, name))


def _looked_at(name: str) -> dict[str, Any]:
    folder = _folder(name)
    live = jobs.live(name) or _idle(folder, *(folders.changed(folder / part) for part in ("job.json", "metrics.jsonl", "samples")))
    return {**live.shown(), "folder": str(folder), "job": live.job}


@functools.lru_cache(maxsize=16)
def _idle(folder: Path, *_: str) -> Live:
    """A run that no job works on, read once for as long as nothing of it changes: its log can have a hundred thousand lines."""
    from ...wanlite_model.distill.checkpoint import RunFolder
    from .live import Live
    return Live(RunFolder(folder))


async def clip(request: web.Request) -> web.StreamResponse:
    """?run=name&step=120: the clip that was drawn after this step, teacher and student side by side."""
    from .live import clip_path
    step = request.query.get("step", "")
    path = clip_path(_folder(request.query.get("run", "")), int(step) if step.isdecimal() else 0)
    if not path.is_file():
        return web.json_response({"error": "No clip was drawn after this step."}, status=404)
    return web.FileResponse(path)


def _folder(name: str) -> Path:
    from ...wanlite_model.formats.place import check_name
    return folders.output_folder("runs") / check_name(name, "a run")


async def disk(request: web.Request) -> web.Response:
    """What WanLite keeps on disk: {"runs", "cache", "starts": {"bytes", "count"} each, "free": bytes of the drive of the runs}. With ?lost=1 also
    {"unsaved": [names of runs that ended and whose student is in no model folder], "unfinished": [names of runs that trained and did not end]}, without
    what the graph that runs now works on.
    """
    from . import disk as kept
    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, kept.told, "lost" in request.query))


async def clear(_: web.Request) -> web.Response:
    """Clears what no job works on: {"freed": bytes, "kept": [{"name", "why": a sentence} of what stays]}."""
    from . import disk as kept
    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, kept.cleared))
