"""ComfyUI's server: what a browser can ask of it beside its own routes."""
from __future__ import annotations

import sys
from typing import Any

from aiohttp import web

from . import jobs

FINISH = "/wanlite/finish"


def running_server() -> Any | None:
    """The server of this process, or None where there is none, as in most tests: importing its module here would not make one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def add_routes() -> None:
    """To be called while ComfyUI loads its packs: afterwards the server takes no more. A second copy of the pack must not add them again,
    since a server with two routes of one name does not start.
    """
    server = running_server()
    if server is not None and all(route.path != FINISH for route in server.routes):
        server.routes.post(FINISH)(finish)


async def finish(request: web.Request) -> web.Response:
    """{"node_id": "12"} asks the job at that node to end with its best student so far; 404 when none trains there."""
    node_id = (await request.json())["node_id"]
    if jobs.finish(node_id):
        return web.json_response({"finishing": True})
    return web.json_response({"error": f"No WanLite Distill is training at node {node_id} now, so there is nothing to finish. "
                                       "Before its first step, Cancel stops it and keeps what it has done."}, status=404)
