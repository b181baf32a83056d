"""What a MODEL in fp8 is like inside ComfyUI: run by its Python, in its checkout, and prints JSON.

python inside_fp8.py PACK MODEL LORA
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from torch.nn.functional import linear


@torch.inference_mode()
def main(pack: str, model: str, lora: str) -> dict[str, Any]:
    sys.path.insert(0, str(Path.cwd()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before anything else of ComfyUI
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    importlib.import_module("folder_paths")  # by it and by comfy.model_management the pack knows its host
    _, stored = load_pack(Path(pack))
    host, fp8 = (importlib.import_module(f"pack.{name}") for name in ("nodes._host", "flux_core.fp8"))
    exact = host.load_model(Path(model), "auto", "auto").model.diffusion_model
    patcher = host.load_model(Path(model), "fp8", "auto")
    layers = {n: m for n, m in patcher.model.named_modules() if isinstance(m, stored.PatchedFp8Linear)}
    kept = {f"{n}.{k}": t.clone() for n, m in layers.items() for k, t in m.named_buffers()}
    size = comfy.model_management.module_size(patcher.model.diffusion_model)
    numbers = sum(p.nbytes for p in patcher.model.diffusion_model.parameters())
    found: dict[str, Any] = {
        "layers": len(layers),
        "blocks": [len(exact.double_blocks), len(exact.single_blocks)],
        "counted": size == numbers + sum(t.nbytes for t in kept.values()),
        "smaller": size < 0.8 * comfy.model_management.module_size(exact),
    }

    name, layer = next((n, m) for n, m in layers.items() if n.endswith("img_attn.qkv"))
    weight = exact.get_submodule(name.removeprefix("diffusion_model.")).weight
    twin = fp8.Fp8Linear(fp8.in_fp8(weight), layer.bias, layer.dtype)
    x = torch.randn(3, layer.in_features)
    plain, key = twin(x), f"{name}.weight"
    found["in fp8"] = torch.equal(layer(x), plain)
    found["rounded"] = not torch.allclose(plain, linear(x, weight, layer.bias), atol=1e-3)

    patched, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)
    dense = layer.dense_weight(torch.float32)
    merged = comfy.lora.calculate_weight(patched.patches[key], dense.clone(), key)
    comfy.model_management.load_models_gpu([patched])
    found["beside"] = torch.allclose(layer(x), plain + linear(x, merged - dense), atol=1e-5)
    found["changed"] = not torch.allclose(layer(x), plain, atol=1e-3)
    patched.add_patches({key: ("diff", (torch.zeros_like(merged),))})
    comfy.model_management.load_models_gpu([patched])
    found["merged"] = torch.equal(layer(x), linear(x, merged, layer.bias))
    comfy.model_management.load_models_gpu([patcher])
    found["base after it"] = torch.equal(layer(x), plain)

    cpu = torch.device("cpu")
    none = importlib.import_module("pack.nodes._comfy").limited(1)(patcher.model, cpu, cpu)
    comfy.model_management.load_models_gpu([none])
    found["nothing loaded"] = patcher.model.model_loaded_weight_memory == 0 and torch.equal(layer(x), plain)
    found["kept"] = all(
        torch.equal(kept[f"{n}.{k}"].view(torch.uint8), t.view(torch.uint8))
        for n, m in layers.items()
        for k, t in m.named_buffers()
    )
    again = patcher.cached_patcher_init  # as ComfyUI makes one of another kind
    another = again[0](*again[1], disable_dynamic=True)
    found["made again"] = any(isinstance(m, stored.PatchedFp8Linear) for m in another.model.modules())
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
