"""Saves ComfyUI's own FLUX MODEL and our VAE as its nodes ModelSave and CheckpointSave do; prints the names.

Run by ComfyUI's Python, in its checkout: python inside_saved.py PACK MODEL VAE OUTPUT.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from inside import load_pack
from safetensors import safe_open


def main(pack: str, model: str, vae: str, output: str) -> list[str]:
    load_pack(Path(pack))
    import comfy.sd

    network = comfy.sd.load_diffusion_model(model)
    autoencoder = importlib.import_module("pack.nodes.host_comfy_vae").load_vae(vae)
    comfy.sd.save_checkpoint(output, network, vae=autoencoder)
    with safe_open(output, framework="pt") as file:
        return list(file.keys())


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
