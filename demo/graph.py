"""From a workflow as the browser saves it to a prompt as the server takes it, by the rules of ComfyUI's own frontend."""
from dataclasses import dataclass
from typing import Any

from wanlite_model.errors import WanLiteError

_NEVER, _BYPASS = 2, 4                              # node modes: muted, bypassed
_NOTES = ("Note", "MarkdownNote")                   # known to the browser alone, and connected to nothing
_WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": object, "MARKDOWN": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Link:
    origin: str         # node id
    origin_slot: int
    type: str


def to_api(workflow: dict, object_info: dict) -> dict:
    """The prompt {node id: {"inputs", "class_type", "_meta"}} of a saved workflow.

    Args:
        workflow: the saved file: nodes, and links as [id, origin, origin slot, target, target slot, type].
        object_info: what the server answers to GET /object_info; it names the widgets of each node.

    Raises:
        WanLiteError: a node this server does not have, a subgraph, or values that do not fit a node's widgets.
    """
    if not isinstance(workflow.get("nodes"), list) or not isinstance(workflow.get("links"), list):
        raise WanLiteError("This is not a saved workflow: it has no lists named nodes and links.",
                           fix="Save it in ComfyUI with Workflow > Save; files of Export (API) need no conversion.")
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    links = {link[0]: _Link(origin=str(link[1]), origin_slot=link[2], type=link[5]) for link in workflow["links"]}
    subgraphs = {subgraph["id"] for subgraph in workflow.get("definitions", {}).get("subgraphs", ())}
    prompt = {}
    for node_id, node in nodes.items():
        kind = node["type"]
        if node.get("mode", 0) in (_NEVER, _BYPASS) or kind in (*_NOTES, "Reroute", "PrimitiveNode"):
            continue
        if kind in subgraphs:
            raise WanLiteError(f"Node {node_id} ({node.get('title', kind)}) is a subgraph, which this conversion does not read.",
                               fix="Unpack it in ComfyUI (right click > Unpack Subgraph) and save again.")
        if kind not in object_info:
            raise WanLiteError(f"Node {node_id} is a {kind}, and this ComfyUI has no such node.",
                               fix="Install the node pack it comes from, or update ComfyUI.")
        prompt[node_id] = {"inputs": _inputs(node, nodes, links, object_info[kind]["input"]), "class_type": kind,
                           "_meta": {"title": node.get("title") or object_info[kind].get("display_name") or kind}}
    for entry in prompt.values():       # links from muted nodes lead nowhere
        entry["inputs"] = {name: value for name, value in entry["inputs"].items()
                           if not isinstance(value, list) or value[0] in prompt}
    return prompt


def _inputs(node: dict, nodes: dict[str, dict], links: dict[Any, _Link], spec: dict) -> dict[str, Any]:
    """Values of the widgets in their order, then every connected input, which wins over its widget."""
    inputs = {name: {"__value__": value} if isinstance(value, list) else value     # a bare list would read as a link
              for name, value in _widget_values(node, spec).items()}
    for slot in node.get("inputs", ()):
        link = links.get(slot.get("link"))
        source = _source(link, slot["type"], nodes, links) if link else None
        if source is None:
            continue
        origin, origin_slot = source
        if nodes[origin]["type"] == "PrimitiveNode":
            inputs[slot["name"]] = nodes[origin]["widgets_values"][0]
        else:
            inputs[slot["name"]] = [origin, origin_slot]
    return inputs


def _widget_values(node: dict, spec: dict) -> dict[str, Any]:
    saved = node.get("widgets_values", [])
    if isinstance(saved, dict):         # some packs save by name
        return {name: saved[name] for name, _ in widgets(spec) if name in saved}
    slots = [slot for name, declared in widgets(spec) for slot in ((name, declared), *controls(name, declared))]
    # Values behind the last slot are of widgets that only the browser has, such as a preview or an upload button.
    if len(saved) < len(slots):
        raise WanLiteError(f"Node {node['id']} ({node['type']}) has {len(saved)} saved widget values",
                           f"and this ComfyUI's {node['type']} has {len(slots)}: {', '.join(name for name, _ in slots)}.",
                           "Open the workflow in this ComfyUI and save it again.")
    values = {}
    for (name, declared), value in zip(slots, saved):
        if declared is None:
            continue
        kind = _kind(declared)
        if value is not None and (not isinstance(value, _WIDGETS[kind]) or (kind in ("INT", "FLOAT") and isinstance(value, bool))):
            raise WanLiteError(f"Node {node['id']} ({node['type']}) has {value!r} saved for {name}", f"which takes {kind}.",
                               "Its widgets have changed since: open the workflow in this ComfyUI and save it again.")
        values[name] = value
    return values


def widgets(spec: dict) -> list[tuple[str, list]]:
    """The inputs that the browser shows as widgets, in its order: required ones first."""
    declared = [item for group in ("required", "optional") for item in spec.get(group, {}).items()]
    return [(name, value) for name, value in declared if _kind(value) in _WIDGETS and not _options(value).get("forceInput")]


def controls(name: str, declared: list) -> list[tuple[str, None]]:
    """The widgets that the browser adds after a number or list it may change by itself once a prompt is queued."""
    control = _options(declared).get("control_after_generate")
    if _kind(declared) == "INT" and (name in ("seed", "noise_seed") if control is None else control):
        return [("control_after_generate", None)]
    if _kind(declared) == "COMBO" and control:
        return [("control_after_generate", None), ("control_filter_list", None)]
    return []


def _kind(declared: list) -> str:
    return "COMBO" if isinstance(declared[0], list) else declared[0]        # the older way lists the choices themselves


def _options(declared: list) -> dict:
    return declared[1] if len(declared) > 1 else {}


def _source(link: _Link, wanted: str, nodes: dict[str, dict], links: dict[Any, _Link]) -> tuple[str, int] | None:
    """The output (node id, slot) that really feeds a link, through reroutes and bypassed nodes; None when nothing does."""
    visited = set()
    while link is not None:
        if link in visited:
            raise WanLiteError(f"Node {link.origin} feeds itself through reroutes or bypassed nodes.", fix="Remove that connection.")
        visited.add(link)
        node = nodes[link.origin]
        if node.get("mode", 0) == _BYPASS:
            slot = _passing_input(node, link.origin_slot, wanted)
        elif node["type"] == "Reroute":
            slot = node["inputs"][0]
        else:
            return link.origin, link.origin_slot
        link = links.get(slot.get("link")) if slot else None
    return None


def _passing_input(node: dict, output_slot: int, wanted: str) -> dict | None:
    """The input that a bypassed node hands through to its output."""
    inputs = node.get("inputs", [])
    given = node["outputs"][output_slot]["type"]
    if wanted in ("*", "", 0):
        return inputs[output_slot if output_slot < len(inputs) else 0] if inputs else None
    same_place = inputs[output_slot:output_slot + 1]
    if same_place and _fits(same_place[0]["type"], given) and _fits(same_place[0]["type"], wanted):
        return same_place[0]
    exact = [slot for slot in inputs if slot["type"] == wanted]
    loose = [slot for slot in inputs if _fits(slot["type"], given) and _fits(slot["type"], wanted)]
    return next(iter(exact + loose), None)


def _fits(one: str, other: str) -> bool:
    if one in ("*", "", 0) or other in ("*", "", 0):
        return True
    return bool(set(str(one).lower().split(",")) & set(str(other).lower().split(",")))
