"""Which readers open a student, of every kind of WAN and every storage of its teacher, in every export: `python -m benchmarks.readers`."""
import sys

from demo.comfy_path import ROOT

sys.path.append(str(ROOT / "tests"))        # the WANs and their files are those of the tests
