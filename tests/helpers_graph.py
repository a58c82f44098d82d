"""A saved workflow: run by ComfyUI's own nodes in this process, and where its nodes lie."""
import torch

from demo.graph import to_api


def run_here(workflow, node_classes, stand_ins):
    """{node kind: [outputs of each such node, in the order they ran]}.

    node_classes: {node kind: its class}. stand_ins: {node kind: a function of the node's inputs that gives its outputs}, for what is not on this machine.
    """
    info = {kind: {"input": node.INPUT_TYPES(), "display_name": kind} for kind, node in node_classes.items()}
    prompt, outputs, ran = to_api(workflow, info), {}, {}

    def run(key):
        if key not in outputs:
            node = prompt[key]
            given = {name: run(value[0])[value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}
            outputs[key] = _run(node["class_type"], node_classes, stand_ins, given)
            ran.setdefault(node["class_type"], []).append(outputs[key])
        return outputs[key]

    with torch.inference_mode():
        for key in prompt:
            run(key)
    return ran


def _run(kind, node_classes, stand_ins, given):
    if kind in stand_ins:
        return stand_ins[kind](**given)
    node = node_classes[kind]
    if hasattr(node, "GET_SCHEMA"):
        return node.PREPARE_CLASS_CLONE({}).EXECUTE_NORMALIZED(**given).result
    return getattr(node(), node.FUNCTION)(**given)


def box(node):
    """[x, y, width, height] of a saved node on the canvas, with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return [x, y - 30, width, height + 30]


def nodes_in(group, workflow):
    """The nodes that lie in a group of a saved workflow, below its title."""
    left, top, width, height = group["bounding"]
    for node in workflow["nodes"]:
        x, y, wide, tall = box(node)
        if left < x and top + 34 < y and x + wide < left + width and y + tall < top + height:
            yield node
