// The button "Finish now" on WanLite Distill, and what its job takes, as told before the first step.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TOOLTIP = "Ends the training now with the best student so far, and the graph goes on. "
    + "Cancel stops the graph instead, and queueing it again goes on with the training.";

/** The ids that the server may know a node by: "5", or "12:5" inside the subgraph node 12, one for each place that shows the subgraph. */
function executionIds(node, graph = node.graph.rootGraph, path = "") {
    return graph.nodes.flatMap((other) => {
        if (other === node) return [`${path}${other.id}`];
        return other.subgraph ? executionIds(node, other.subgraph, `${path}${other.id}:`) : [];
    });
}

/** Asks for each of the node's ids until one of them is that of the running job, and tells what was answered. */
async function finish(node) {
    let answer;
    for (const id of executionIds(node)) {
        const response = await api.fetchApi("/wanlite/finish", { method: "POST", body: JSON.stringify({ node_id: id }) });
        answer = await response.json();
        if (answer.finishing) break;
    }
    app.extensionManager.toast.add(answer.finishing
        ? { severity: "success", summary: "Finishing", detail: "This run ends with the best student so far, and the graph goes on.", life: 8000 }
        : { severity: "warn", summary: "Not finished", detail: answer.error, life: 8000 });
}

/** A place below the widgets for what the running job says of itself. Never saved, of one height. */
function addTold(node) {
    const element = document.createElement("div");
    element.className = "wanlite-told";
    element.style.cssText = "font: 11px sans-serif; opacity: 0.8; overflow: auto; height: 100%; white-space: pre-wrap;";
    const widget = node.addDOMWidget("wanlite_told", "div", element, { serialize: false, getMinHeight: () => 54, getMaxHeight: () => 54 });
    widget.serialize = false;
    const show = ({ detail }) => { if (executionIds(node).includes(detail.node)) element.textContent = detail.text; };
    api.addEventListener("wanlite.told", show);
    const removed = node.onRemoved;
    node.onRemoved = function (...given) { api.removeEventListener("wanlite.told", show); return removed?.apply(this, given); };
}

app.registerExtension({
    name: "WanLite.FinishNow",
    nodeCreated(node) {
        if (node.comfyClass !== "WanLiteDistill") return;
        const button = node.addWidget("button", "Finish now", null, () => finish(node), { serialize: false }); // never in a prompt
        button.serialize = false; // nor among the saved values, which belong to widgets by their position
        button.tooltip = TOOLTIP;
        addTold(node);
    },
});
