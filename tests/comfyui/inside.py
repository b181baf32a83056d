"""What a quantised MODEL is like inside ComfyUI: run by its Python, in its checkout, and prints JSON.

python inside.py PACK MODEL LORA OUTPUT
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch


def load_pack(root: Path) -> Any:
    """The pack's ComfyUI side and its patched layers, with ComfyUI around them, on the CPU."""
    sys.path.insert(0, str(Path.cwd()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before anything else of ComfyUI
    for name in ("comfy.model_management", "folder_paths"):  # by these two the pack knows its host
        importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(
        "pack", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module("pack.nodes.host_comfy_loading"), importlib.import_module(
        "pack.nodes.host_comfy_quant"
    )


@torch.inference_mode()
def main(pack: str, model: str, lora: str, output: str) -> dict[str, Any]:
    ours, stored = load_pack(Path(pack))
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    percents: list[int] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, *_, **__: percents.append(value))
    sys.modules["pack.nodes.run_report"].SHOWN_FROM = 1
    patcher = ours.load_model(Path(model), "auto", "auto")
    layers = {n: m for n, m in patcher.model.named_modules() if isinstance(m, stored.PatchedLinear)}
    kept = {f"{n}.{k}": t.clone() for n, m in layers.items() for k, t in m.named_buffers()}
    addresses = {f"{n}.{k}": t.data_ptr() for n, m in layers.items() for k, t in m.named_buffers()}
    numbers = sum(p.nbytes for p in patcher.model.diffusion_model.parameters())
    found: dict[str, Any] = {
        "layers": len(layers),
        "percents": percents,
        "size": comfy.model_management.module_size(patcher.model.diffusion_model),
        "held": numbers + sum(t.nbytes for t in kept.values()),
        "dense": sum(t.numel() * 4 for t in patcher.model.state_dict().values()),
        "extra keys": [key for key in patcher.model.state_dict() if "quantized" in key],
    }

    name, layer = next((n, m) for n, m in layers.items() if "blocks" in n)
    x = torch.randn(3, layer.in_features)
    plain, weight = layer(x), layer.weight
    found["as seen"] = [[*weight.shape], str(weight.dtype), str(weight.device), repr(weight)]
    found["numbers"] = torch.equal(weight.float() + 0, layer.dense_weight(torch.float32))

    patched, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)
    key = f"{name}.weight"
    found["patches"] = sum(key in patched.patches for key in (f"{n}.weight" for n in layers))
    comfy.model_management.load_models_gpu([patched])
    merged = comfy.lora.calculate_weight(patched.patches[key], layer.dense_weight(torch.float32), key)
    expected = torch.nn.functional.linear(x, merged, layer.bias)
    found["patched"] = torch.allclose(layer(x), expected, atol=1e-5)
    found["beside"] = layer.beside is not None and layer.patches == []
    comfy.model_management.load_models_gpu([patched])
    found["used again"] = torch.allclose(layer(x), expected, atol=1e-5)
    patched.add_patches({key: ("diff", (torch.zeros_like(merged),))})
    comfy.model_management.load_models_gpu([patched])
    found["merged"] = torch.equal(layer(x), expected) and layer.beside is None and len(layer.patches) == 2
    found["changed"] = not torch.equal(layer(x), plain)
    comfy.model_management.load_models_gpu([patcher])
    found["base after it"] = torch.equal(layer(x), plain)
    comfy.model_management.load_models_gpu([patched])
    found["again"] = not torch.equal(layer(x), plain)
    patched.detach()
    found["detached"] = torch.equal(layer(x), plain)
    found["kept"] = all(
        torch.equal(kept[f"{n}.{k}"], t) and addresses[f"{n}.{k}"] == t.data_ptr()
        for n, m in layers.items()
        for k, t in m.named_buffers()
    )

    other = patcher.clone()
    other.add_patches(patcher.get_key_patches("diffusion_model."), 0.5, 0.5)  # as ModelMergeSimple does
    comfy.model_management.load_models_gpu([other])
    found["merged with itself"] = torch.allclose(layer(x), plain, atol=1e-5)
    other.detach()

    cpu = torch.device("cpu")
    limited = ours.limited(found["size"] // 2)(patcher.model, cpu, cpu)
    comfy.model_management.load_models_gpu([limited])
    found["within its limit"] = 0 < patcher.model.model_loaded_weight_memory <= found["size"] // 2
    found["limited"] = torch.equal(layer(x), plain)
    limited.detach()
    none = ours.limited(1)(patcher.model, cpu, cpu).clone()
    none.add_patches({f"{name}.bias": (torch.ones(layer.out_features),)})
    comfy.model_management.load_models_gpu([none])
    found["nothing loaded"] = patcher.model.model_loaded_weight_memory == 0 and len(layer.bias_function) == 1
    found["its bias patched"] = torch.allclose(layer(x), plain + 1, atol=1e-5)
    none.detach()
    found["bias as before"] = torch.equal(layer(x), plain)

    load_vae = importlib.import_module("pack.nodes.host_comfy_vae").load_vae
    vae = load_vae(next((Path(model).parents[1] / "vae").glob("*.safetensors")))
    found["a VAE is loaded whole"] = vae.disable_offload and not vae.patcher.is_dynamic()

    importlib.import_module("pack.flux_core.quant.formats").has_fp8 = lambda device: False  # as on Apple's
    bare = ours.load_model(Path(model), "auto", "auto").model
    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    found["without fp8"] = torch.equal(bare.get_submodule(name)(x), plain) and not any(
        tensor.dtype in fp8 for tensor in (*bare.parameters(), *bare.buffers())
    )

    state = {k: t.contiguous() for k, t in patcher.model_state_dict("diffusion_model.").items()}
    comfy.utils.save_torch_file(state, output)
    try:
        comfy.utils.copy_to_param(patcher.model, key, merged)
    except TypeError as error:
        found["overwritten"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
