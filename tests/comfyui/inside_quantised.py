"""What a MODEL in fp8 or int8 is like inside ComfyUI: run by its Python, in its checkout, and prints JSON.

python inside_quantised.py PACK MODEL LORA FORM
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from torch import Tensor, nn
from torch.nn.functional import linear


def twin_of(form: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """The layer of flux_core of these numbers."""
    fp8, int8 = (importlib.import_module(f"pack.flux_core.backends.{name}") for name in ("fp8", "cpu_int8"))
    if form == "int8":
        return int8.Int8Linear(int8.quantize_int8(weight), bias, torch.float32)
    return fp8.Fp8Linear(fp8.to_fp8(weight), bias, torch.float32)


def kept(form: str, layers: dict[str, Any]) -> list[Tensor]:
    """Codes and scales of all layers, as bytes."""
    tensors: list[Tensor] = []
    for layer in layers.values():
        tensors += (layer.quantized.codes, layer.quantized.scale) if form == "int8" else layer.buffers()
    return [tensor.clone().contiguous().view(torch.uint8) for tensor in tensors]


@torch.inference_mode()
def main(pack: str, model: str, lora: str, form: str) -> dict[str, Any]:
    ours, stored = load_pack(Path(pack))
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    kind = {"fp8": stored.PatchedFp8Linear, "int8": stored.PatchedInt8Linear}[form]
    exact = ours.load_model(Path(model), "auto", "auto").model.diffusion_model
    patcher = ours.load_model(Path(model), form, "auto")
    layers = {n: m for n, m in patcher.model.named_modules() if isinstance(m, kind)}
    before = kept(form, layers)
    size = comfy.model_management.module_size(patcher.model.diffusion_model)
    numbers = sum(p.nbytes for p in patcher.model.diffusion_model.parameters())
    found: dict[str, Any] = {
        "layers": len(layers),
        "blocks": [len(exact.double_blocks), len(exact.single_blocks)],
        "counted": size == numbers + sum(t.nbytes for t in before),
        "smaller": size < 0.8 * comfy.model_management.module_size(exact),
    }

    name, layer = next((n, m) for n, m in layers.items() if n.endswith("img_attn.qkv"))
    weight = exact.get_submodule(name.removeprefix("diffusion_model.")).weight
    x = torch.randn(3, layer.in_features)
    plain, key = twin_of(form, weight, layer.bias)(x), f"{name}.weight"
    found["as in flux_core"] = torch.equal(layer(x), plain)
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
    none = ours.limited(1)(patcher.model, cpu, cpu).clone()
    none.add_patches({f"{name}.bias": (torch.ones(layer.out_features),)})
    comfy.model_management.load_models_gpu([none])
    found["nothing loaded"] = patcher.model.model_loaded_weight_memory == 0
    found["its bias patched"] = torch.allclose(layer(x), plain + 1, atol=1e-5)
    none.detach()
    found["kept"] = all(map(torch.equal, kept(form, layers), before))
    make, how = patcher.cached_patcher_init[:2]  # as ComfyUI makes one of another kind
    again = make(*how, disable_dynamic=True)
    found["made again"] = sum(isinstance(m, kind) for m in again.model.modules()) == len(layers)
    state = patcher.model_state_dict("diffusion_model.")
    found["saved as numbers"] = torch.equal(state[key].contiguous(), dense)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
