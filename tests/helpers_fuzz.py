"""Readers that do what none may do, and the process that tries them: what the judge of spoiled files must see."""
import os
import pickle
import time

from safetensors.torch import load_file

from benchmarks.fuzz.case import Reader
from benchmarks.fuzz.originals import copied
from benchmarks.fuzz.targets import Target, alike, stored
from wanlite_model.errors import WanLiteError


def opens_another_file(path):
    return (path.parent.parent / "outside" / "wan.safetensors").read_bytes()


def unpickles(path):
    return pickle.loads((path.parent.parent / "outside" / "wan.bin").read_bytes())


def starts_a_program(path):
    return os.system("true")


def changes_the_file(path):
    os.utime(path, ns=(0, 0))


def takes_memory(path):
    return bytearray(2**31)


def says_a_lot(path):
    raise WanLiteError("A word. " * 5, "A word. " * 5, "No end")


def says_nothing(path):
    raise WanLiteError("")


def raises_another_error(path):
    raise KeyError(str(path))


def exits(path):
    raise SystemExit


def reads_other_numbers(path):
    return {name: tensor * 2 for name, tensor in load_file(path).items()}


def reads_what_is_there(path):
    return load_file(path)


def refuses_it(path):
    raise WanLiteError("This is whole.")


def crashes(path):
    os._exit(3)


def waits(path):
    time.sleep(600)


READERS = (opens_another_file, unpickles, starts_a_program, changes_the_file, takes_memory, says_a_lot, says_nothing, raises_another_error, exits,
           reads_other_numbers, reads_what_is_there, refuses_it, crashes, waits)


def check(place, found):
    if isinstance(found, dict):
        alike(found, stored([place.path]))


def serve_badly(connection, home, seed, comfyui):
    """Answers as `serve` does; the number says which reader has the original file, which is not spoiled."""
    reader = Reader(home, (), (WanLiteError,))
    while (number := connection.recv()) is not None:
        place = copied(home, "file")
        place.same = True
        connection.send((place.kind, READERS[number].__name__))
        connection.send(reader.tried(place, Target(name="", kinds=("file",), read=READERS[number], check=check)))
