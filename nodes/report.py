"""What a node tells: on the node, and in ComfyUI's log, since the browser shows a node's text only for its own preview nodes."""
import logging

from comfy_api.latest import ui

log = logging.getLogger(__name__)


def told(node: str, report: str) -> ui.PreviewText:
    """Logs the report and returns it as the node's output for the browser."""
    log.info("WanLite %s: %s", node, report)
    return ui.PreviewText(report)
