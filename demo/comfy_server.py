"""A real ComfyUI server in a process of its own, driven over HTTP and websocket as the browser drives it."""
import contextlib
import json
import os
import socket
import subprocess  # nosec B404  # starts ComfyUI, without a shell
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

from run import PATIENT

from .comfy_path import install_pack

# The addresses are on this machine: a proxy of the environment must not see them.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


class ServerError(RuntimeError):
    """The server did not start, died, or refused a request; the text holds what it said."""


class ComfyServer:
    """One running server. The defaults make it the ComfyUI of a folder, with this pack in a base folder of its own.

    Args:
        comfyui: the folder of its main.py.
        base: its private base folder; when it is `comfyui` itself, ComfyUI starts as its own users start it.
        arguments: go to main.py.
        python: the interpreter and its options.
        environment: of the process; what this process has when left out.
        pack: puts the pack into a custom_nodes folder.

    Attributes:
        url: its address, without a slash at the end.
        base: its private base folder: models/, input/, output/, custom_nodes/ (with a copy of the pack).
        log_path: what the process writes.
    """

    def __init__(self, comfyui: Path, base: Path, arguments: tuple[str, ...] = (), *, python: tuple[str, ...] = (sys.executable,),
                 environment: dict[str, str] | None = None, pack: Callable[[Path], Any] = install_pack):
        self.base = base.resolve()
        self.log_path = self.base / "server.log"
        self._client_id = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._events: list[dict] = []
        self._first_event: dict[str, int] = {}      # prompt id -> how many events there were when it was queued
        self._listener_ended: str | None = None
        pack(self.base / "custom_nodes")
        self._process = self._start(comfyui.resolve(), arguments, python, environment)

    def _start(self, comfyui: Path, arguments: tuple[str, ...], python: tuple[str, ...], environment: dict[str, str] | None) -> subprocess.Popen:
        for name in ("models/diffusion_models", "models/vae", "models/text_encoders", "input", "output", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        folders = () if self.base == comfyui else (
            "--base-directory", str(self.base), "--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}")
        if environment is None:     # whatever would put a folder before ComfyUI's own on its sys.path stays behind
            environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
            environment |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **PATIENT}
        command = [*python, str(comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port), *folders, "--disable-auto-launch",
                   "--disable-api-nodes", *arguments]
        with open(self.log_path, "wb") as log:
            return subprocess.Popen(command, cwd=self.base, env=environment, stdin=subprocess.DEVNULL,  # nosec B603  # no shell
                                    stdout=log, stderr=subprocess.STDOUT)

    def wait_until_up(self, timeout: float = 300) -> None:
        """Returns when the server answers and its events arrive here.

        Raises:
            ServerError: it ended, or it was silent for `timeout` seconds; with the end of its log.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._get("/system_stats")
                break
            except OSError:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise ServerError(f"ComfyUI did not answer within {timeout:.0f} seconds.\n{self.log()}") from None
                time.sleep(0.2)
        connection = websocket.create_connection(
            f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self._client_id}", timeout=None, http_no_proxy=["127.0.0.1"])
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: websocket.WebSocket) -> None:
        ended = "the connection was closed"
        try:
            while True:
                message = connection.recv()
                if not message:
                    break
                # Frames of bytes are preview pictures; their JSON neighbours tell everything else.
                event = {"type": "preview", "data": {"bytes": len(message)}} if isinstance(message, bytes) else json.loads(message)
                with self._changed:
                    self._events.append({**event, "arrived": time.monotonic()})
                    self._changed.notify_all()
        except (OSError, websocket.WebSocketException) as error:
            ended = str(error)
        with self._changed:
            self._listener_ended = ended
            self._changed.notify_all()

    def object_info(self) -> dict:
        """Every node the server knows: {class name: {"input": ..., "output": ..., ...}}."""
        return self._get("/object_info")

    def translations(self) -> dict:
        """What the packs' locales add to the browser's texts: {language: {"nodeDefs": {class name: ...}, ...}}."""
        return self._get("/i18n")

    def queue(self, prompt: dict) -> str:
        """Queues a graph in API format and returns its prompt id.

        Raises:
            ServerError: the server's validation refused it, or a part of it; the text says which node and why.
        """
        with self._changed:
            before = len(self._events)
        answer = self._post("/prompt", {"prompt": prompt, "client_id": self._client_id})
        if answer.get("node_errors"):       # it drops the wrong nodes with what follows them, and would run the rest
            self._post("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt()
            raise ServerError("\n".join(["The server takes only a part of the graph", *_reasons(answer["node_errors"])]))
        self._first_event[answer["prompt_id"]] = before
        return answer["prompt_id"]

    def events(self, prompt_id: str, timeout: float = 300) -> Iterator[dict]:
        """The events since this prompt was queued, {"type", "data", "arrived": seconds}, as they come; ends with the one that ends the prompt.

        Events that name no prompt (an extension's own, say) are among them.

        Raises:
            ServerError: nothing came for `timeout` seconds, or the server died.
        """
        position = self._first_event[prompt_id]
        while True:
            event = self._event_at(position, timeout)
            position += 1
            if event["data"].get("prompt_id", prompt_id) != prompt_id:
                continue
            yield event
            if event["type"] in _ENDS and event["data"].get("prompt_id") == prompt_id:
                return

    def _event_at(self, position: int, timeout: float) -> dict:
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self._events) > position or self._listener_ended, timeout)
            if len(self._events) > position:
                return self._events[position]
        self._check_alive()
        why = f"No event came for {timeout:.0f} seconds" if not arrived else f"The event stream ended: {self._listener_ended}"
        raise ServerError(f"{why}.\n{self.log()}")

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The prompt's history entry ({"outputs", "status", ...}) once it has ended, in whatever way.

        Raises:
            ServerError: it had not ended `timeout` seconds from now, or the server died.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self._get(f"/history/{prompt_id}").get(prompt_id)
            if entry:       # it is written slightly after the event that ends the prompt
                return entry
            self._check_alive()
            time.sleep(0.1)
        raise ServerError(f"The prompt {prompt_id} had not ended after {timeout:.0f} seconds.\n{self.log()}")

    def run(self, prompt: dict, timeout: float = 300) -> dict:
        """Queues, waits, and returns the outputs: {node id: {"images": [...], ...}}.

        Raises:
            ServerError: a node failed, or the prompt was interrupted; with what the server said.
        """
        return self.outputs(self.queue(prompt), timeout)

    def outputs(self, prompt_id: str, timeout: float = 300) -> dict:
        """The outputs of a queued prompt once it has ended; raises as `run` does."""
        entry = self.wait(prompt_id, timeout)
        if entry["status"]["status_str"] != "success":
            raise ServerError(failure(entry))
        return entry["outputs"]

    def interrupt(self) -> None:
        """What the Cancel button does: asks the running prompt to stop."""
        self._post("/interrupt", {})

    def clear_queue(self) -> None:
        """Drops the prompts that wait; the running one goes on."""
        self._post("/queue", {"clear": True})

    def log(self, lines: int = 60) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _check_alive(self) -> None:
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"ComfyUI ended with exit code {code}. The end of {self.log_path}:\n{self.log()}")

    def fetch(self, path: str) -> bytes:
        """What a browser gets from that path. Raises urllib.error.HTTPError where there is nothing."""
        with _OPENER.open(self.url + path, timeout=60) as answer:
            return answer.read()

    def _get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def _post(self, path: str, value: dict) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(value).encode("utf-8"), {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise ServerError(_refusal(error)) from None


def failure(entry: dict) -> str:
    """What went wrong, in a sentence, from a history entry that did not succeed."""
    for name, data in entry["status"]["messages"]:
        if name == "execution_error":
            return f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}\n{''.join(data['traceback'])}"
        if name == "execution_interrupted":
            return f"{data['node_type']} (node {data['node_id']}) was interrupted."
    return f"The prompt ended as {entry['status']['status_str']} without saying why."


def _refusal(error: urllib.error.HTTPError) -> str:
    body = error.read().decode("utf-8", errors="replace")
    try:
        answer = json.loads(body)
        return "\n".join([answer["error"]["message"], *_reasons(answer["node_errors"])])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {error.code} {error.reason}: {body}"


def _reasons(node_errors: dict) -> list[str]:
    return [f"{node['class_type']} (node {node_id}): {reason['message']}: {reason['details']}"
            for node_id, node in node_errors.items() for reason in node["errors"]]


@contextlib.contextmanager
def running_comfyui(comfyui: Path, base: Path, arguments: tuple[str, ...] = (), **started: Any) -> Iterator[ComfyServer]:
    """A ComfyServer with these arguments, up, for the length of a with block."""
    server = ComfyServer(comfyui, base, arguments, **started)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.close()
