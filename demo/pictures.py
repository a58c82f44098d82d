"""Draws every node as ComfyUI's page shows it, and the tiny demo's graph: `python -m demo.pictures`.

Writes web/docs/img/<node id>.webp for the nodes' help and docs/graph.webp for the README. It needs what `python run.py test` sets up, and Chromium.
"""
import io
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from run import SetupError, find_comfyui

from .browser import been_here_before, chromium
from .comfy_path import ROOT, put_comfyui_first
from .comfy_server import ComfyServer, running_comfyui
from .main import prepare, say
from .workflows import TINY

NODES, GRAPH = ROOT / "web" / "docs" / "img", ROOT / "docs" / "graph.webp"
PAGE = {"width": 2800, "height": 2400}
EDGE, TITLE = 12, 30            # pixels of canvas around a node, and the height of its title
MENU = 150                      # pixels at the page's sides that its menu and side bar may lie over
GRAPH_WIDTH = 2400              # pixels at most
# No badge above a node, which would be cut off; letters however small, since the whole graph is drawn smaller afterwards; nothing over the canvas.
SETTINGS = {"Comfy.NodeBadge.NodeSourceBadgeMode": "None", "LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Minimap.Visible": False}
WIDE = 480                      # of a node: what its widgets say is then read whole
QUALITY = 88                    # of the WebP

# Where the canvas is drawn, the menu and the side bar of the page lie over it: nodes are placed clear of them.
ALONE = """id => {
    app.graph.clear();
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    node.pos = [0, 0];
    node.setSize([Math.max(WIDE, node.computeSize()[0]), node.computeSize()[1]]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [300, 160];
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
}""".replace("WIDE", str(WIDE))
ANSWERED = "() => [...document.querySelectorAll('.wanlite-disk')].every(line => line.textContent)"      # the server, for WanLite Distill
NODE_AT = "() => [...app.canvasPosToClientPos([0, -TITLE]), app.graph.nodes[0].size[0], app.graph.nodes[0].size[1] + TITLE]".replace("TITLE", str(TITLE))
WHOLE = """() => {
    const boxes = [...app.graph.nodes.map(node => [node, TITLE]), ...app.graph.groups.map(group => [group, 0])]
        .map(([{ pos, size }, title]) => [pos[0], pos[1] - title, pos[0] + size[0], pos[1] + size[1]]);
    const [left, top, right, bottom] = [Math.min, Math.min, Math.max, Math.max].map((most, i) => most(...boxes.map(box => box[i])));
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const scale = Math.min(1, (canvas.width - 2 * MENU) / (right - left), (canvas.height - 2 * MENU) / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [MENU / scale - left, MENU / scale - top];
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
    return [...app.canvasPosToClientPos([left, top]), (right - left) * scale, (bottom - top) * scale];
}""".replace("TITLE", str(TITLE)).replace("MENU", str(MENU))


def main() -> int:
    try:
        comfyui = find_comfyui()
        if comfyui is None:
            raise SetupError("No ComfyUI is set up. Run `python run.py test`, which installs one, or set COMFYUI_PATH to the folder that holds ComfyUI's main.py.")
        draw(comfyui)
    except SetupError as error:
        say(str(error))
        return 2
    return 0


def draw(comfyui: Path) -> None:
    """All pictures, of a server of its own."""
    put_comfyui_first(comfyui)
    NODES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        been_here_before(base, SETTINGS)
        prepare(base)
        (base / "models/loras").mkdir()
        (base / "models/loras/style.safetensors").touch()           # so that a list of LoRAs shows one
        with running_comfyui(comfyui, base, ("--cpu",)) as server, chromium() as browser:
            page = browser.new_page(viewport=PAGE)
            draw_nodes(page, server)
            draw_graph(page, server)


def draw_nodes(page: Page, server: ComfyServer) -> None:
    opened(page, server.url)
    for node_id in ours(server.object_info()):
        page.evaluate(ALONE, node_id)
        page.wait_for_function(ANSWERED)
        page.wait_for_timeout(600)          # until it is drawn, and the text fields have come to where it is
        keep(page, page.evaluate(NODE_AT), NODES / f"{node_id}.webp")


def draw_graph(page: Page, server: ComfyServer) -> None:
    opened(page, f"{server.url}/?template={TINY.stem}&source=WanLite", "node => node.type === 'WanLiteDistill'")
    page.evaluate(WHOLE)
    page.wait_for_timeout(1000)
    keep(page, page.evaluate(WHOLE), GRAPH)


def ours(info: Mapping[str, Any]) -> list[str]:
    """The ids of the pack's nodes."""
    return [name for name, node in info.items() if node["python_module"] == "custom_nodes.WanLite"]


def opened(page: Page, url: str, has: str = "() => true") -> None:
    """Returns when the page has its graph with such a node, and the graph that it opens with has had time to come."""
    page.goto(url)
    page.wait_for_function(f"window.app?.graph?.nodes.some({has})", timeout=120_000)
    page.wait_for_timeout(2500)


def keep(page: Page, place: list[float], path: Path) -> None:
    """Saves that part [left, top, width, height] of the page with a little around it."""
    left, top, width, height = place
    clip = {"x": left - EDGE, "y": top - EDGE, "width": width + 2 * EDGE, "height": height + 2 * EDGE}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.thumbnail((GRAPH_WIDTH, GRAPH_WIDTH), Image.LANCZOS)
    picture.save(path, quality=QUALITY, method=6)
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
