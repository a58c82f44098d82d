"""What widgets alone decide, refused before the queue starts, on the node that is wrong.

A node's validate_inputs raises where others return a sentence: ComfyUI repeats what is returned once for each input that was asked for, and marks all of
these as wrong. What is raised is told once, on the node.
"""
from typing import Any

from comfy_api.latest import io


def check_widgets(node: type[io.ComfyNode], given: dict[str, Any]) -> None:
    """Raises WanLiteError on a choice that is not offered and on a number out of its range. given: {input: value}, None where a link decides.

    ComfyUI leaves to a node what its validate_inputs takes, and older ones check no list of a node of this kind.
    """
    from ..wanlite_model.errors import WanLiteError
    for widget in node.define_schema().inputs:
        value = given.get(widget.id)
        if value is None:
            continue
        if isinstance(widget, io.Combo.Input) and value not in widget.options:
            raise WanLiteError(f"{widget.id} is {value!r}, which is not offered.", "", f"Choose one of {', '.join(map(str, widget.options))}.")
        if isinstance(widget, (io.Int.Input, io.Float.Input)) and not widget.min <= value <= widget.max:
            raise WanLiteError(f"{widget.id} is {value:g}.", "", f"Set it between {widget.min:g} and {widget.max:g}.")


def check_expert(given: dict[str, Any]) -> None:
    """Raises WanLiteError where it was said which of two experts a MODEL is and the other one is not connected, or the other way round."""
    from ..wanlite_model.errors import WanLiteError
    from .comfy_bridge.choices import EVERY_LEVEL, HIGH, LOW, WHOLE
    expert, boundary, connected = given.get("expert"), given.get("boundary"), "other_expert" in given
    if expert in (HIGH, LOW) and not connected:
        raise WanLiteError(f"'{expert}' is chosen, and the other expert is not connected.", "A video is made by both, one after the other.",
                           f"Connect the MODEL of the expert of {LOW if expert == HIGH else HIGH} to other_expert, or choose '{WHOLE}'.")
    if expert in (WHOLE, EVERY_LEVEL) and connected:
        raise WanLiteError(f"A second expert is connected, and '{expert}' is chosen.", "", f"Choose '{HIGH}' or '{LOW}', or disconnect it.")
    if boundary and not connected:
        raise WanLiteError(f"boundary is {boundary:g}, and no other expert is connected.", "It is where one of two experts takes over from the other.",
                           "Set it to 0, or choose the expert and connect the other one.")
