"""ComfyUI's page as a user's hands have it: nodes from the menu, wires, Run and Cancel; and what WanLite Distill shows there."""
import json
import time

from helpers_tiny import random_bank, random_wan
from safetensors.torch import save_file

from demo.canvas import PROMPTS
from demo.main import prepare
from demo.workflows import SETTINGS, TINY, build

TEACHER, BANK = "page-teacher.safetensors", "page-bank.safetensors"
STEPS = 1000            # more than are ever done here
RECIPE = {"learning_rate": 2e-3, "batch_size": 2, "teacher_steps": 2, "renoised": 0.5, "evaluations": 40}
SMALL = {**SETTINGS[TINY], "teacher": TEACHER, "size": (64, 64, 5), "steps": 2, "job": {"steps": STEPS}, "recipe": RECIPE, "save": {},
         "text": {"prompts": ("WanLiteEncodePrompts", PROMPTS, {"bank": f"input/{BANK}"})}}
KEPT = {"UNETLoader", "ModelSamplingSD3", "VAELoader", "EmptyHunyuanLatentVideo", "WanLiteEncodePrompts", "WanLiteCreateStudent", "WanLiteRecipe",
        "WanLiteDistill", "WanLiteSaveStudent"}
DISTILL = "[...app.graph.nodes, ...[...app.graph.subgraphs.values()].flatMap(each => each.nodes)].find(node => node.type === 'WanLiteDistill')"
LAST = 60               # seconds that anything here may take


def put_files(base):
    """The demo's VAE, a smaller teacher, and two prompts."""
    prepare(base)
    save_file(dict(random_wan(seed=3, ffn_dim=128).state_dict()), base / "models/diffusion_models" / TEACHER)
    random_bank(2).save(base / "input" / BANK)


def small_graph(name, object_info):
    """The demo's graph for a smaller teacher, as it is saved, up to Save Student: a canvas without a graphics card takes seconds to draw all of it."""
    graph = build({**SMALL, "name": name}, object_info)
    nodes = [node for node in graph["nodes"] if node["type"] in KEPT]
    ids = {node["id"] for node in nodes}
    links = [link for link in graph["links"] if {link[1], link[3]} <= ids]
    kept = {link[0] for link in links}
    for output in (output for node in nodes for output in node["outputs"]):
        output["links"] = [link for link in output["links"] if link in kept]
    return {**graph, "nodes": nodes, "links": links, "groups": []}


def steps_of(base, run):
    """The steps that a run's log tells of, whole lines only."""
    path = base / "output/wanlite/runs" / run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if row["kind"] == "step"]


def look_at_distill(page):
    page.evaluate(f"() => {{ app.canvas.ds.scale = 0.8; app.canvas.centerOnNode({DISTILL}); app.canvas.setDirty(true, true); }}")
    page.wait_for_timeout(800)          # until it is drawn, and with Vue's nodes until their widgets are there again


class Graph:
    """The graph on a page, in one of its renderers."""

    def __init__(self, page, server, vue):
        self.page, self.server, self.vue = page, server, vue
        self.change_setting("Comfy.VueNodes.Enabled", vue)

    def change_setting(self, name, value):
        """As the user's settings are, from the page's next start on."""
        self.page.request.post(f"{self.server.url}/settings/{name}", data=json.dumps(value))

    def open(self, address=""):
        self.page.goto(f"{self.server.url}/{address}")
        self.page.wait_for_function("window.app?.graph?.nodes.length")         # the graph that a page opens with comes last
        self.page.wait_for_timeout(500)

    def begin(self, scale):
        """An empty canvas, with its corner where the menu ends."""
        self.open()
        self.page.evaluate("scale => { app.graph.clear(); app.canvas.ds.scale = scale; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true); }", scale)

    def load(self, workflow):
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(500)

    def add(self, kind, at):
        """A stock node, by the page's own call."""
        self.page.evaluate("([kind, at]) => { const node = LiteGraph.createNode(kind); node.pos = at; app.graph.add(node); }", [kind, at])

    def open_menu(self):
        self.page.get_by_label("Node Library").click()
        self.page.get_by_text("WanLite", exact=True).last.click()

    def drag(self, name, at):
        """From the menu to a place on the screen. An old page's Vue nodes complain of lists in a menu's preview, of stock nodes too."""
        entry = self.page.get_by_text(name, exact=True).last
        entry.scroll_into_view_if_needed()
        entry.hover()
        self.page.mouse.down()
        self.page.mouse.move(at[0] - 30, at[1] - 30, steps=4)
        self.page.mouse.move(*at, steps=4)
        self.page.mouse.up()
        self.page.wait_for_timeout(200)
        self.page.evaluate("app.extensionManager.toast.removeAll?.()")

    def wire(self, kind, output, other, *inputs):
        """With the mouse, from a node's output to inputs of another one."""
        for name in inputs:
            self.page.mouse.move(*self.slot(kind, output, False))
            self.page.mouse.down()
            self.page.mouse.move(*self.slot(other, name, True), steps=6)
            self.page.wait_for_timeout(50)
            self.page.mouse.up()

    def slot(self, kind, name, is_input):
        """Where it is on the screen."""
        node, index, at = self.page.evaluate("""([kind, name, isInput]) => {
            const node = app.graph.nodes.find(node => node.type === kind), slots = isInput ? node.inputs : node.outputs;
            const index = slots.findIndex(slot => slot.name === name);
            return [node.id, index, app.canvasPosToClientPos(node.getConnectionPos(isInput, index))];
        }""", [kind, name, is_input])
        if self.vue:
            box = self.page.locator(f'[data-slot-key="{node}-{"in" if is_input else "out"}-{index}"]').bounding_box()
            return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        return at

    def links(self):
        """{(node, output, node, input)} of kinds and names."""
        return set(map(tuple, self.page.evaluate("""() => [...app.graph.links.values()].map(link => {
            const from = app.graph.getNodeById(link.origin_id), to = app.graph.getNodeById(link.target_id);
            return [from.type, from.outputs[link.origin_slot].name, to.type, to.inputs[link.target_slot].name];
        })""")))

    def set(self, kind, **values):
        self.page.evaluate("""([kind, values]) => {
            const node = app.graph.nodes.find(node => node.type === kind);
            for (const [name, value] of Object.entries(values)) {
                const widget = node.widgets.find(widget => widget.name === name);
                widget.value = value;
                widget.callback?.(value);
            }
        }""", [kind, values])

    def run(self):
        self.page.get_by_role("button", name="Run", exact=True).first.click()         # newer pages call the arrow beside it Run too

    def wait(self):
        """Until the server has nothing to do any more."""
        deadline = time.monotonic() + LAST
        while self.waiting():
            assert time.monotonic() < deadline, self.server.log()
            self.page.wait_for_timeout(200)

    def waiting(self):
        """How many graphs the server runs or has in its queue."""
        return sum(map(len, self.page.request.get(f"{self.server.url}/queue").json().values()))

    def told(self, node):
        """What the WanLite node of this name said last, by the server's log."""
        return self.server.log(300).rpartition(f"WanLite {node}: ")[2]

    def end(self):
        """Nothing is left for the next test to wait for."""
        self.server.clear_queue()
        self.server.interrupt()

    @property
    def cancel(self):
        return self.page.get_by_label("Cancel current run")

    def panel(self, number=0):
        return Panel(self.page, number)


class Panel:
    """What a WanLite Distill shows; by its number on the page."""

    def __init__(self, page, number):
        self.page, self.element = page, page.locator(".wanlite").nth(number)

    @property
    def status(self):
        return self.element.locator(".wanlite-status")

    def step(self):
        """That it says the run is at, or 0."""
        words = self.status.text_content().split()
        return int(words[1]) if words[0] == "Step" else 0

    def wait_for_step(self, step):
        """Until it says that this step is done; returns the one it then says."""
        deadline = time.monotonic() + LAST
        while (at := self.step()) < step:
            assert time.monotonic() < deadline, self.status.text_content()
            self.page.wait_for_timeout(100)
        return at

    def drawn(self):
        """How many columns of the chart's picture have a curve in them: more, the further it has come."""
        return self.element.locator("canvas").evaluate("""canvas => {
            const { width, height } = canvas, pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let columns = 0;
            for (let x = 42; x < width - 12; x++) {
                let inked = 0;
                for (let y = 8; y < height - 24; y++) inked += pixels[4 * (y * width + x) + 3] > 60;
                columns += inked > 0;
            }
            return columns;
        }""")

    def legend(self):
        """Its entries that are seen whole."""
        return self.element.locator(".wanlite-legend").evaluate("""legend => {
            const room = legend.getBoundingClientRect(), whole = ({ right, bottom }) => right <= room.right + 6 && bottom <= room.bottom + 1;
            return [...legend.children].filter(entry => whole(entry.getBoundingClientRect())).map(entry => entry.textContent.trim());
        }""")

    def clip(self):
        """(the step that it is of, whether the picture has come)"""
        image = self.element.locator("img")
        return self.element.locator("figcaption").text_content(), image.evaluate("image => image.complete && image.naturalWidth > 0")
