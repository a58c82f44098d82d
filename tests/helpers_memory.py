"""Files of real size that take no disk, and processes that are held to an amount of memory or watched."""
import ctypes
import json
import math
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from demo.comfy_path import ROOT
from wanlite_model.config import WanConfig
from wanlite_model.formats.container import DTYPES
from wanlite_model.formats.keymap import wan_shapes

WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30)
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40)
ROOM = 200 * 2**20          # for thread stacks, buffers and what the heap loses between tensors

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="tells a process's own memory from its files by /proc and RLIMIT_DATA")


def sparse_file(path, tensors, values):
    """A safetensors file of {name: (dtype, shape)}. values: {name: its first numbers}. All else is zero: holes, which take no disk."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, value in values.items():
            file.seek(8 + len(header) + entries[name]["data_offsets"][0])
            file.write(torch.as_tensor(value, dtype=DTYPES[tensors[name][0]]).reshape(-1).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(header) + end)
    return path


def sparse_wan(path, config):
    """A WAN file in bf16. The first number of each tensor is its mark."""
    shapes = wan_shapes(config)
    return sparse_file(path, {name: ("BF16", shape) for name, shape in shapes.items()}, {name: [mark(name)] for name in shapes})


def mark(name):
    """A number that tells this tensor from its neighbours, the same in bf16."""
    return 1 + zlib.crc32(name.encode()) % 128 / 128


def largest(config, itemsize=2):
    """Bytes of the largest tensor of such a WAN."""
    return itemsize * max(map(math.prod, wan_shapes(config).values()))


def memory(field):
    """Bytes of this process: VmData, what it may write to that is no shared file; RssAnon, what of that is in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def allow(more):
    """Lets this process take that much more memory, and fail beyond.

    RLIMIT_DATA counts heap, private mappings and stacks, touched or not. It leaves out files that are mapped to be read, whose pages the system
    takes back when it needs them: RLIMIT_AS would count them, and the tens of gigabytes that torch reserves.
    """
    import resource         # no Windows has it
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + more, resource.RLIM_INFINITY))


@contextmanager
def watched():
    """`.peak`: the most memory of its own, in bytes, that this process took meanwhile beyond what it had."""
    ctypes.CDLL(None).malloc_trim(0)            # what was freed and not given back would be taken first, and not show
    found, over, before = SimpleNamespace(peak=0), threading.Event(), memory("RssAnon")

    def watch():
        while not over.is_set():
            found.peak = max(found.peak, memory("RssAnon") - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def python(code, *arguments):
    """Runs it in a process of its own, which can import what tests can; returns how it ended."""
    return subprocess.run([sys.executable, "-c", "import sys; sys.path.append('tests')\n" + code, *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
