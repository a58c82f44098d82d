"""Run as a program, `helpers_watch.py COMFYUI PACK`: what the pack does while ComfyUI starts, as one JSON object on the last line.

ComfyUI's own modules are imported first, as they are when it comes to its custom nodes. Whatever Python's audit hooks tell from there on is the pack's.
"""
import asyncio
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WATCHED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.dlopen", "tempfile.", "glob.", "urllib.", "winreg.")
HARMLESS = ("os.putenv", "os.unsetenv", "os.fspath")


def main(comfyui: str, folder: str) -> dict:
    sys.path.insert(0, comfyui)
    sys.dont_write_bytecode = True
    import comfy.cli_args
    comfy.cli_args.args.cpu = True
    import utils.extra_config   # noqa: F401, I001  # before nodes, which puts another `utils` on the path
    import server               # noqa: F401
    import nodes                # noqa: F401
    import comfy_api.latest     # noqa: F401
    import torch
    did, watching, loop = [], [True], asyncio.new_event_loop()

    def hook(event: str, arguments: tuple) -> None:
        if watching and (event == "open" and arguments[2] & WRITES or event.startswith(WATCHED) and event not in HARMLESS):
            caller = sys._getframe(1).f_code.co_filename
            if not caller.startswith("<frozen importlib"):      # which looks for a module's file
                did.append((event, str(arguments[0]) if arguments else ""))

    for name in ("_lazy_init", "is_available", "device_count", "get_device_properties", "mem_get_info"):
        setattr(torch.cuda, name, lambda *arguments, told=name, asked=getattr(torch.cuda, name): did.append((f"torch.cuda.{told}", "")) or asked(*arguments))
    modules, threads = set(sys.modules), set(threading.enumerate())
    sys.addaudithook(hook)
    began = time.perf_counter()
    name = folder.replace(".", "_x_")       # as ComfyUI names it
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py", submodule_search_locations=[folder])
    pack = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    extension = loop.run_until_complete(pack.comfy_entrypoint())
    listed = loop.run_until_complete(extension.get_node_list())
    shown = [node.GET_SCHEMA().node_id for node in listed]
    seconds = time.perf_counter() - began
    watching.clear()
    loop.close()
    return {"seconds": seconds, "nodes": shown, "did": did, "threads": [thread.name for thread in set(threading.enumerate()) - threads],
            "ours": sorted(one.removeprefix(name + ".") for one in set(sys.modules) - modules if one.startswith(name + ".")),
            "others": sorted(one for one in set(sys.modules) - modules if not one.startswith(name))}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
