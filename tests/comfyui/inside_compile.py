"""What ComfyUI's node TorchCompileModel does to our MODEL: run by its Python, in its checkout, prints JSON.

python inside_compile.py PACK MODEL: {"error": a sentence or "", "agreement": dB between the latents of the
compiled and the plain model, "compiled": the number of graphs that torch compiled}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from inside_patches import conditioning, decibels, node, sampled


@torch.inference_mode()
def main(pack: str, path: str) -> dict[str, Any]:
    host, _ = load_pack(Path(pack))
    from torch._dynamo.utils import counters

    model = host.load_model(Path(path), "auto", "auto")
    plain = sampled(model, conditioning())
    patched = node("nodes_torch_compile", "TorchCompileModel", backend="inductor")(model)
    error = ""
    try:
        compiled = sampled(patched, conditioning())
    except Exception as problem:  # what a user of ComfyUI would read
        error, compiled = f"{type(problem).__name__}: {problem}", plain
    graphs = counters["stats"]["unique_graphs"]
    again = sampled(model, conditioning())
    return {
        "error": error,
        "agreement": decibels(compiled, plain),
        "compiled": graphs,
        "plain model afterwards": decibels(again, plain),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
