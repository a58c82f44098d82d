// WanLite Distill lives: its run as a chart on the node, with where it is and what it takes, the latest clips, "Finish now" and "Open run".
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { draw, legendOf } from "./chart.js";
import { answerOf, onCleared, showDisk } from "./disk.js";
import { captionOf, clipAddress, gib, status, wordsOf } from "./words.js";

const WIDTH = 400; // pixels of a new node
const HEIGHT = 320; // pixels that the panel has from the start: nothing on the node moves when something is shown
const LONGEST = 400; // characters of what is wrong: ComfyUI lists all files that there are
const TYPING = 400; // milliseconds after which a name counts as typed
const NONE = { // what is shown where there is no run
    run: null, running: false, step: 0, steps: 0, curve: [], errors: [], plain_cut: null, yardstick: "", told: "", report: "", clips: [], memory: null };
const OVER = ["execution_success", "execution_error", "execution_interrupted"];

const STYLE = `
.wanlite { box-sizing: border-box; display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: ${HEIGHT - 20}px;
    padding: 2px 4px; overflow: hidden; contain: inline-size;
    font: 11px/14px sans-serif; color: var(--input-text, #ddd); }
.wanlite-status { min-height: 28px; max-height: 28px; overflow: hidden; font-weight: 600; }
.wanlite-view { flex: 1; min-height: 110px; display: flex; gap: 6px; }
.wanlite-chart { flex: 1; min-width: 0; position: relative; }
.wanlite-chart canvas { position: absolute; inset: 0; width: 100%; height: 100%; color: inherit; }
.wanlite-clip { flex: 0 1 45%; min-width: 0; margin: 0; display: flex; flex-direction: column; }
.wanlite-clip[hidden] { display: none; }
.wanlite-clip img { flex: 1; min-height: 0; max-width: 100%; object-fit: contain; cursor: pointer; }
.wanlite-clip figcaption, .wanlite-line { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; min-height: 14px; opacity: 0.85; }
.wanlite-legend { white-space: normal; height: 28px; }
.wanlite-legend > span { white-space: nowrap; }
.wanlite-told { min-height: 28px; max-height: 28px; overflow-y: auto; opacity: 0.7; white-space: pre-wrap; }
.wanlite-buttons { display: flex; gap: 6px; min-height: 24px; }
.wanlite-buttons button { flex: 1; font: inherit; color: inherit; background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555);
    border-radius: 6px; cursor: pointer; }
.wanlite-buttons button:hover { border-color: currentColor; }
.wanlite-disk { display: flex; gap: 6px; }
.wanlite-disk span { min-width: 0; overflow: hidden; text-overflow: ellipsis; }
.wanlite-clear { flex: none; font: inherit; color: inherit; background: none; border: 0; padding: 0; text-decoration: underline; cursor: pointer; }
`;

const say = (...given) => wordsOf(app.extensionManager.setting.get("Comfy.Locale") ?? "en")(...given);

function made(tag, className, parent, text = "") {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    parent?.append(element);
    return element;
}

/** The ids that the server may know a node by: "5", or "12:5" inside the subgraph node 12, one for each place that shows the subgraph. */
function executionIds(node, graph = node.graph?.rootGraph, path = "") {
    return (graph?.nodes ?? []).flatMap((other) => {
        if (other === node) return [`${path}${other.id}`];
        return other.subgraph ? executionIds(node, other.subgraph, `${path}${other.id}:`) : [];
    });
}

/** A text where it is another one: what is written anew would lose what a user has marked in it. */
function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
}

/** Has an object call `more` before what it calls by this name already. */
function chain(object, name, more) {
    const before = object[name];
    object[name] = function (...given) { more(); return before?.apply(this, given); };
}

/** What one node shows of its run. */
class Panel {
    constructor(node) {
        this.node = node;
        this.run = null;
        this.lost = false;
        this.heard = 0; // how often something was heard or asked for: an answer that comes late is an old one
        this.build();
        new ResizeObserver(() => this.show()).observe(this.chart);
        chain(this.nameWidget, "callback", () => this.refreshSoon());
        chain(node, "onAdded", () => this.listen());
        chain(node, "onRemoved", () => this.close());
    }

    build() {
        this.element = made("div", "wanlite widget-expands"); // the second: it takes the room that a Vue node has left
        this.status = made("div", "wanlite-status", this.element);
        const view = made("div", "wanlite-view", this.element);
        this.chart = made("div", "wanlite-chart", view);
        this.canvas = made("canvas", "", this.chart);
        this.clip = made("figure", "wanlite-clip", view);
        this.clip.hidden = true;
        this.image = made("img", "", this.clip);
        this.image.onclick = () => this.open();
        this.caption = made("figcaption", "", this.clip);
        this.legend = made("div", "wanlite-line wanlite-legend", this.element);
        this.memory = made("div", "wanlite-line wanlite-memory", this.element);
        this.told = made("div", "wanlite-told", this.element);
        this.disk = made("div", "wanlite-line wanlite-disk", this.element);
        const buttons = made("div", "wanlite-buttons", this.element);
        for (const [name, pressed] of [["finish", () => this.finish()], ["open", () => this.open()]]) {
            const button = made("button", `wanlite-${name}`, buttons, say(name));
            button.title = say(`${name}Tip`);
            button.onclick = pressed;
        }
    }

    /** While the node is in a graph; one that moves into a subgraph leaves one graph for another. */
    listen() {
        this.close();
        this.stopped = new AbortController();
        const { signal } = this.stopped;
        const on = (target, name, heard) => target.addEventListener(name, heard, { signal });
        on(api, "wanlite.live", ({ detail }) => this.hear(detail));
        on(api, "reconnecting", () => { this.lost = true; this.show(); });
        for (const name of ["reconnected", ...OVER]) on(api, name, () => this.refresh());
        onCleared(() => this.refresh(), { signal });
        on(document, "visibilitychange", () => { if (!document.hidden) this.refresh(); });
        this.refreshSoon(); // once the node has its saved values
    }

    close() {
        clearTimeout(this.soon);
        this.stopped?.abort();
    }

    get nameWidget() {
        return this.node.widgets?.find((widget) => widget.name === "run_name");
    }

    /** The run's name as the node has it; null where it comes through a link, and only the job itself knows. */
    get name() {
        const linked = this.node.inputs?.some((input) => input.widget?.name === "run_name" && input.link != null);
        return linked ? null : this.nameWidget?.value;
    }

    hear(run) {
        const own = this.name === null ? executionIds(this.node).includes(run.node) : run.run === this.name;
        if (!own) return;
        this.lost = false;
        this.heard += 1;
        this.run = run;
        this.show();
    }

    refreshSoon() {
        clearTimeout(this.soon);
        this.soon = setTimeout(() => {
            this.makeRoom();
            this.refresh();
        }, TYPING);
    }

    /** A canvas has drawn a new node, or one of an older workflow, before it knew of the panel. */
    makeRoom() {
        const { node } = this, least = node.computeSize();
        if (!LiteGraph.vueNodesMode && node.size[1] < least[1]) node.setSize([node.size[0], least[1]]);
        node.setDirtyCanvas(true, true);
    }

    /** Asks the server: what was heard before may be out of date, or was never heard. */
    async refresh() {
        this.show();
        if (document.hidden || this.stopped.signal.aborted) return;
        const { name } = this, heard = this.heard += 1;
        const run = await answerOf(`/wanlite/run?${new URLSearchParams(name ? [["run", name]] : executionIds(this.node).map((id) => ["node", id]))}`);
        if (!run || heard !== this.heard || name !== this.name) return;
        this.lost = false;
        if (run.run || run.error || name) this.run = run; // of a job over whose name only it knew: what was heard last stays
        this.show();
        if (!run.running) showDisk(this.disk, say);
    }

    /** Draws with the page's next frame; a page in the background has none. */
    show() {
        if (document.hidden || this.waiting) return;
        this.waiting = true;
        requestAnimationFrame(() => { this.waiting = false; this.render(); });
    }

    render() {
        const run = this.run?.run ? this.run : NONE, { memory } = run, step = run.clips.at(-1);
        const { clientWidth, clientHeight } = this.chart;
        write(this.status, this.lost ? say("lost") : this.run?.error ?? status(say, run));
        if (clientWidth && clientHeight) draw(this.canvas, run, clientWidth, clientHeight);
        this.legend.replaceChildren(...legendOf(say, run));
        write(this.memory, memory ? [say("device", { used: gib(memory.used), total: gib(memory.total), peak: gib(memory.peak) }),
            say("process", { process: gib(memory.process) })].join(" · ") : "");
        write(this.told, run.running ? run.told : run.report || run.told);
        this.clip.hidden = !step;
        if (!step) return;
        const address = clipAddress(run.run, step);
        if (this.image.dataset.address === address) return;
        this.image.dataset.address = address;
        this.image.src = api.apiURL(address);
        write(this.caption, captionOf(say, step[0], run.beside));
    }

    async finish() {
        const answer = await answerOf("/wanlite/finish", { method: "POST", body: JSON.stringify({ run: this.run?.run ?? this.name }) });
        app.extensionManager.toast.add(answer?.finishing
            ? { severity: "success", summary: say("finishing"), detail: say("finishingDetail"), life: 8000 }
            : { severity: "warn", summary: say("notFinished"), detail: answer?.error ?? say("lost"), life: 8000 });
    }

    open() {
        const page = new URL("./run.html", import.meta.url);
        page.search = new URLSearchParams({ run: this.run?.run ?? this.name ?? "", language: app.extensionManager.setting.get("Comfy.Locale") ?? "en" });
        window.open(page, "_blank", "noopener");
    }
}

/** ComfyUI runs the rest of a graph that it refuses a part of, and marks that part: what is wrong with it is said here. */
function tellRefused() {
    const refused = Object.values(app.lastNodeErrors ?? {}), ours = ({ type }) => type?.startsWith("WanLite");
    const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])];
    if (!refused.length || !graphs.some((graph) => graph.nodes.some(ours))) return;
    for (const { class_type: kind, errors: [{ type, message, details }] } of refused) {
        const detail = type === "exception_during_validation" ? details : `${message}: ${details}`;
        app.extensionManager.toast.add({ severity: "warn", summary: LiteGraph.registered_node_types[kind]?.title ?? kind, detail: detail.slice(0, LONGEST), life: 20_000 });
    }
}

app.registerExtension({
    name: "WanLite.Live",
    init() {
        made("style", "", document.head, STYLE);
    },
    setup() {
        api.addEventListener("promptQueued", tellRefused);
    },
    nodeCreated(node) {
        if (node.comfyClass !== "WanLiteDistill") return;
        const panel = new Panel(node);
        const widget = node.addDOMWidget("wanlite_live", "div", panel.element, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT });
        widget.serialize = false; // nor among the saved values, which belong to widgets by their position
        node.setSize([Math.max(WIDTH, node.size[0]), node.size[1]]);
    },
});
