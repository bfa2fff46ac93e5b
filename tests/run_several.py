"""Run several executables of bin/ one after another in one process, so that torchrun starts its processes once.

torchrun --nproc_per_node 2 tests/run_several.py jobs.json      # [[executable, {flag: value}], ...]
"""

import json
import runpy
import sys
from pathlib import Path

import torch

BIN = Path(__file__).parents[1] / "bin"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, flags in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = [name, *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]
        runpy.run_path(str(BIN / name), run_name="__main__")
