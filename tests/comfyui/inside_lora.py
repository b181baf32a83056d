"""What ComfyUI's LoRA nodes do to our network and to its own, on the same weights: prints JSON.

Run by ComfyUI's Python, in its checkout: python inside_lora.py PACK FILES OUTPUT, FILES a JSON object of
paths. Cases are [the dB between ComfyUI's changed and plain latent, the dB between the changed latents of the
two networks].
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from inside import load_pack
from inside_patches import Model, conditioning, decibels, drawn, sampled
from torch import Tensor

Found = dict[str, Any]


def extra(file: str, name: str) -> Any:
    return getattr(importlib.import_module(f"comfy_extras.{file}"), name)


def stock_lora(model: Model, path: str, strength: float = 1.0) -> Model:
    """As LoraLoaderModelOnly."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path), strength, 0)[0]


# Hooks


def hook(path: str, strength: float = 1.0) -> Any:
    """As CreateHookLoraModelOnly."""
    import comfy.hooks
    import comfy.utils

    return comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(path), strength, 0)


def keyframes(hooks: Any) -> Any:
    """The hooks at 0.2 from the beginning, at 1.3 from the middle on."""
    create, later = extra("nodes_hooks", "CreateHookKeyframe")(), None
    for strength, start in ((0.2, 0.0), (1.3, 0.4)):
        (later,) = create.create_hook_keyframe(strength, start, later)
    return extra("nodes_hooks", "SetHookKeyframes")().set_hook_keyframes(hooks, later)[0]


def hooked(hooks: Any, timesteps: tuple[float, float] | None = None) -> list[Any]:
    """As ConditioningSetProperties, where there are timesteps with the unchanged prompt for the others."""
    properties = extra("nodes_hooks", "ConditioningSetProperties")()
    settings: dict[str, Any] = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    if timesteps is not None:
        settings["timesteps"] = timesteps
    (changed,) = properties.set_properties(conditioning(), **settings)
    if timesteps is None:
        return changed
    rest = extra("nodes_hooks", "ConditioningSetDefaultAndCombine")()
    return rest.set_default_and_combine(changed, conditioning())[0]


HOOKS: dict[str, Callable[[Found], list[Any]]] = {
    "CreateHookLora": lambda files: hooked(hook(files["lora"])),
    "SetHookKeyframes": lambda files: hooked(keyframes(hook(files["lora"], 0.8))),
    "ConditioningSetProperties, timesteps": lambda files: hooked(hook(files["lora"]), (0.0, 0.5)),
    "CombineHooks": lambda files: hooked(
        extra("nodes_hooks", "CombineHooks")().combine_hooks(hook(files["lora"]), hook(files["norms"]))[0]
    ),
    "hook of LoKr": lambda files: hooked(hook(files["lokr"])),
}


def interrupted(model: Model, positive: list[Any]) -> None:
    """A run that is interrupted in its second step, while the hooks are applied."""
    import comfy.model_management
    import comfy.sample

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    noise = torch.zeros(1, 16, 10, 14)
    settings = (3, 1.0, "euler", "simple")
    try:
        comfy.sample.sample(model, noise, *settings, positive, positive, noise, callback=stop, seed=7)
    except comfy.model_management.InterruptProcessingException:
        return
    raise AssertionError("it ran to its end")


def on_quantized(load: Callable[[str, str], Model], files: Found) -> Found:
    """For each form: the hooks on it, to those on its dequantized twin, and what is left after each."""
    import comfy.model_management

    found: Found = {}
    for form, (path, twin) in files["quantized"].items():
        model, dense = load(path, "auto"), load(twin, "auto")
        plain = sampled(model, conditioning())
        found[form] = {}
        for name in ("SetHookKeyframes", "ConditioningSetProperties, timesteps", "hook of LoKr"):
            expected, got = (sampled(each, HOOKS[name](files)) for each in (dense, model))
            found[form][name] = [decibels(expected, plain), decibels(got, expected)]
        both = stock_lora(model, files["norms"], 0.7), stock_lora(dense, files["norms"], 0.7)
        positive = HOOKS["SetHookKeyframes"](files)
        got, expected = (sampled(each, positive) for each in both)
        found[form]["hook beside LoraLoaderModelOnly"] = [decibels(expected, plain), decibels(got, expected)]
        interrupted(model, HOOKS["CreateHookLora"](files))
        found[form]["after an interrupt"] = torch.equal(sampled(model, conditioning()), plain)
        try:
            sampled(model, hooked(broken(files)))
            found[form]["broken"] = "ran"
        except IndexError:
            found[form]["broken"] = "failed"
        found[form]["after an error"] = torch.equal(sampled(model, conditioning()), plain)
        interrupted(model, HOOKS["hook of LoKr"](files))
        comfy.model_management.unload_all_models()
        found[form]["after Unload Models"] = torch.equal(sampled(model, conditioning()), plain)
    return found


def broken(files: Found) -> Any:
    """A hook that changes some layers and fails at a later one."""
    import comfy.hooks

    group = hook(files["lora"])
    weights = {"diffusion_model.double_blocks.0.img_attn.qkv.bias": ("diff", ())}
    other = comfy.hooks.create_hook_model_as_lora(None, None, 1.0, 0.0)
    other.hooks[0].weights = weights
    return group.clone_and_combine(other)


def on_activations(load: Callable[[str, str], Model], files: Found) -> Found:
    """In int8 and fp8, whose twin is not exact: a hook throughout to the plain LoRA of the same strength."""
    found: Found = {}
    for form in ("int8", "fp8"):
        model = load(files["model"], form)
        plain, expected = (
            sampled(model, conditioning()),
            sampled(stock_lora(model, files["lora"]), conditioning(), cfg=1.0),
        )
        got = sampled(model, HOOKS["CreateHookLora"](files), cfg=1.0)
        found[form] = [decibels(expected, sampled(model, conditioning(), cfg=1.0)), decibels(got, expected)]
        found[f"{form} after it"] = torch.equal(sampled(model, conditioning()), plain)
    return found


# Saving


def saved_lora(model: Model, path: str, prefix: str) -> dict[str, Tensor]:
    """The file of LoraSave of the difference that a LoRA makes to a MODEL."""
    import comfy.utils

    changed = stock_lora(model, path)
    (difference,) = extra("nodes_model_merging", "ModelSubtract")().merge(changed, model, 1.0)
    extra("nodes_lora_extract", "LoraSave").execute(prefix, 8, "standard", True, model_diff=difference)
    return comfy.utils.load_torch_file(output_of(prefix))


def output_of(prefix: str) -> str:
    import folder_paths

    return str(next(Path(folder_paths.get_output_directory()).glob(f"{prefix}_*.safetensors")))


def saving(ours: Model, stock: Model, load: Callable[[str, str], Model], files: Found) -> Found:
    import comfy.sd
    import folder_paths
    from comfy_extras.nodes_model_merging import save_checkpoint

    found: Found = {}
    theirs, mine = (
        saved_lora(model, files["norms"], f"lora-{name}")
        for name, model in (("stock", stock), ("ours", ours))
    )
    found["LoraSave keys"] = [len(theirs), len(mine), sorted(theirs) == sorted(mine)]
    merging = extra("nodes_model_merging", "ModelSave")()
    for name, model in (
        ("ours", stock_lora(ours, files["norms"])),
        ("stock", stock_lora(stock, files["norms"])),
    ):
        merging.save(model, f"model-{name}")
        output = folder_paths.get_output_directory()
        save_checkpoint(model, filename_prefix=f"checkpoint-{name}", output_dir=output)
    plain = sampled(stock, conditioning())
    expected = sampled(stock_lora(stock, files["norms"]), conditioning())
    effect = decibels(expected, plain)
    for name in ("ours", "stock"):
        path = output_of(f"model-{name}")
        found[f"ModelSave of {name} in stock"] = [
            effect,
            decibels(sampled(comfy.sd.load_diffusion_model(path), conditioning()), expected),
        ]
        found[f"ModelSave of {name} in ours"] = [
            effect,
            decibels(sampled(load(path, "auto"), conditioning()), expected),
        ]
        path = output_of(f"checkpoint-{name}")
        loaded = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
        for reader, model in (("stock", loaded), ("ours", load(path, "auto"))):
            found[f"CheckpointSave of {name} in {reader}"] = [
                effect,
                decibels(sampled(model, conditioning()), expected),
            ]
        lora = output_of(f"lora-{name}")
        extracted = sampled(stock_lora(stock, lora), conditioning())
        found[f"LoraSave of {name} by stock's loader"] = [
            decibels(extracted, plain),
            decibels(sampled(stock_lora(ours, lora), conditioning()), extracted),
        ]
        found[f"LoraSave of {name} by ours"] = [
            decibels(extracted, plain),
            decibels(sampled(our_lora(ours, lora), conditioning()), extracted),
        ]
    return found


def our_lora(model: Model, path: str, strength: float = 1.0) -> Model:
    lora = importlib.import_module("pack.nodes.host_comfy_lora")
    changed, _, report = lora.add_lora(model, None, Path(path), strength, 0.0, "")
    assert "unmatched: 0" in report, report
    return changed


# Training


def trained(model: Model, prefix: str, bypass: bool = False, checkpointing: bool = True) -> dict[str, Tensor]:
    """A LoRA after three steps of TrainLoraNode, saved by SaveLoRA."""
    latents = [{"samples": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))}]
    settings: dict[str, Any] = {
        "batch_size": 1, "steps": 3, "grad_accumulation_steps": 1, "learning_rate": 0.01, "rank": 4,
        "optimizer": "SGD", "loss_function": "MSE", "seed": 3, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": checkpointing,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": bypass,
    }  # fmt: skip
    inputs = {name: [value] for name, value in settings.items()}
    positive = [conditioning()]
    node = extra("nodes_train", "TrainLoraNode")
    # the networks list their layers in different orders, hence one draw for each shape
    with mock.patch("torch.nn.init.kaiming_uniform_", lambda t, a: t.data.copy_(drawn(*t.shape, scale=0.05))):
        lora, losses, steps = node.execute([model], latents, positive, **inputs).result
    extra("nodes_train", "SaveLoRA").execute(lora, prefix, steps)
    return lora


def training(ours: Model, stock: Model, load: Callable[[str, str], Model], files: Found) -> Found:
    found: Found = {}
    plain = sampled(stock, conditioning())
    with torch.inference_mode(False):
        theirs = trained(stock, "trained-stock")
        mine = trained(ours, "trained-ours")
    found["keys"] = [len(theirs), len(mine), sorted(theirs) == sorted(mine)]
    with torch.inference_mode(False):
        whole = trained(ours, "trained-whole", checkpointing=False)
    found["without checkpointing"] = max(float((whole[key] - mine[key]).abs().max()) for key in mine)
    found["moved"] = [sum(bool(t.abs().max() > 0) for t in lora.values()) for lora in (theirs, mine)]
    path = output_of("trained-ours")
    expected = sampled(stock_lora(stock, path), conditioning())
    for name, model in (("stock's loader", stock_lora(ours, path)), ("our loader", our_lora(ours, path))):
        found[name] = [decibels(expected, plain), decibels(sampled(model, conditioning()), expected)]
    path, twin = files["quantized"]["NF4"]
    with torch.inference_mode(False):
        quantized = trained(load(path, "auto"), "trained-NF4")
        dense = trained(load(twin, "auto"), "trained-NF4-dense")
        bypassed = trained(load(path, "auto"), "trained-NF4-bypass", True)
    found["NF4 moved"] = [
        sum(bool(t.abs().max() > 0) for t in lora.values()) for lora in (quantized, bypassed)
    ]
    found["NF4's difference"] = max(float((quantized[key] - dense[key]).abs().max()) for key in dense)
    found["NF4 bypassed's difference"] = max(float((bypassed[key] - dense[key]).abs().max()) for key in dense)
    return found


def on_scaled_fp8(load: Callable[[str, str], Model], files: Found) -> Found:
    """A LoRA on a scaled fp8 file: the dB of ComfyUI's and of ours to the LoRA on the dequantized weights."""
    import comfy.sd

    path, twin = files["quantized"]["scale_weight"]
    ours, stock, dense = load(path, "auto"), comfy.sd.load_diffusion_model(path), load(twin, "auto")
    truth = sampled(stock_lora(dense, files["lora"]), conditioning())
    theirs, mine = (sampled(stock_lora(model, files["lora"]), conditioning()) for model in (stock, ours))
    plain = [sampled(model, conditioning()) for model in (stock, ours)]
    return {
        "without LoRA": [0.0, decibels(plain[1], plain[0])],
        "LoRA": [decibels(theirs, plain[0]), decibels(mine, theirs)],
        "to the truth": [decibels(theirs, truth), decibels(mine, truth)],
    }


@torch.inference_mode()
def main(pack: str, files: str, output: str) -> Found:
    host, _ = load_pack(Path(pack))
    import comfy.sd
    import folder_paths

    folder_paths.set_output_directory(output)
    named = json.loads(files)

    def load(path: str, weight_dtype: str) -> Model:
        return host.load_model(Path(path), weight_dtype, "auto")

    ours, stock = load(named["model"], "auto"), comfy.sd.load_diffusion_model(named["model"])
    plain = sampled(stock, conditioning())
    found: Found = {"plain": [0.0, decibels(sampled(ours, conditioning()), plain)]}
    for name in ("lora", "control", "norms", "lokr"):
        theirs = sampled(stock_lora(stock, named[name]), conditioning())
        mine = sampled(stock_lora(ours, named[name]), conditioning())
        found[f"LoraLoader, {name}"] = [decibels(theirs, plain), decibels(mine, theirs)]
        mine = sampled(our_lora(ours, named[name]), conditioning())
        found[f"Load FLUX LoRA, {name}"] = [decibels(theirs, plain), decibels(mine, theirs)]
    for name, positive in HOOKS.items():
        theirs, mine = (sampled(model, positive(named)) for model in (stock, ours))
        found[name] = [decibels(theirs, plain), decibels(mine, theirs)]
    found["quantized"] = on_quantized(load, named)
    found["scaled fp8"] = on_scaled_fp8(load, named)
    found["activations"] = on_activations(load, named)
    found["saving"] = saving(ours, stock, load, named)
    found["training"] = training(ours, stock, load, named)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
