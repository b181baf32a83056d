"""Run by test_fused.py in a process of its own, where Triton interprets: kernels beside their twins.

Triton reads TRITON_INTERPRET as it is imported, and from then on can do nothing else. Prints one JSON object:
{case: largest error, in units of what is allowed} and under "launched" what the whole model launched.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import torch

ROOT = Path(__file__).resolve().parents[2]
pack = ModuleType("rectiflux")  # without the nodes
pack.__path__ = [str(ROOT)]
sys.modules["rectiflux"] = pack
sys.path.insert(0, str(ROOT / "tests" / "flux_core"))

# below, because they import Triton, which must find all of the above done
import kernel_cases  # noqa: E402
from rectiflux.flux_core import fused  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    fused.LARGE, fused.serves = 0, lambda x: "all" not in fused._off
    told: dict[str, object] = {}
    for shape, dtypes in kernel_cases.SHAPES:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            found = kernel_cases.all_cases(shape, dtype)
            told.update({f"{kernel}, {name}, {list(shape)}": value for kernel, value in found})
    told["whole model"], told["launched"] = kernel_cases.whole_model()
    assert not fused._off, fused._off
    print(json.dumps(told))


if __name__ == "__main__":
    with torch.no_grad():
        main()
