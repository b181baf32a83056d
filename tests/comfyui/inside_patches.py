"""What ComfyUI's patches and options do to our network and to its own, on the same weights: prints JSON.

Run by ComfyUI's Python, in its checkout: python inside_patches.py PACK MODEL. For each case: "effect", the dB
between ComfyUI's patched and plain latent, and "agreement", the dB between the two networks' patched latents.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from torch import Tensor

HEIGHT, WIDTH = 10, 14
Model = Any


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two latents; 200 for equal ones."""
    error = float((a - b).square().mean())
    peak = float(b.max() - b.min())
    return 200.0 if error == 0 else min(200.0, 10 * math.log10(peak**2 / error))


def conditioning(**extra: Any) -> list[Any]:
    return [[drawn(1, 16, 32, seed=1), {"pooled_output": drawn(1, 64, seed=2), "guidance": 2.5, **extra}]]


def sampled(
    model: Model, positive: list[Any], size: tuple[int, int] = (HEIGHT, WIDTH), cfg: float = 2.0
) -> Tensor:
    import comfy.sample

    noise = drawn(1, 16, *size, seed=3)
    negative = [[drawn(1, 16, 32, seed=4), {"pooled_output": drawn(1, 64, seed=5), "guidance": 2.5}]]
    settings = (3, cfg, "euler", "simple")
    return comfy.sample.sample(
        model, noise, *settings, positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=7
    )


# Patches: each takes a MODEL and returns one


def node(file: str, name: str, **inputs: Any) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        out = getattr(importlib.import_module(f"comfy_extras.{file}"), name).execute(model, **inputs)
        return out[0] if isinstance(out, tuple) else out.result[0]

    return apply


def with_uso(model: Model) -> Model:
    extras = importlib.import_module("comfy_extras.nodes_model_patch")
    import comfy.model_patcher

    class Projector(torch.nn.Linear):
        """A MODEL_PATCH's network: an image's hidden states [3, n, 8] to text tokens [1, 3 n, hidden]."""

        def forward(self, encoded: Tensor) -> Tensor:
            return super().forward(encoded).flatten(0, 1)[None]

    projector, cpu = Projector(8, 256, bias=False).requires_grad_(False), torch.device("cpu")
    projector.weight.copy_(drawn(256, 8, seed=6))
    patch = comfy.model_patcher.CoreModelPatcher(projector, cpu, cpu)
    patched = model.clone()
    patched.set_model_post_input_patch(extras.UsoStyleProjectorPatch(patch, drawn(3, 4, 8, seed=8)))
    return patched


def with_attention_patches(model: Model) -> Model:
    """Queries scaled, keys and values of some image tokens removed, mask and positions replaced."""
    patched = model.clone()

    def before(q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any, extra_options: Any) -> Any:
        start, stop = extra_options["img_slice"]
        assert q.shape[2] == stop and start == 16 and extra_options["total_blocks"] == 2
        if extra_options["block_type"] == "double":
            mask = torch.zeros(1, 1, q.shape[2], q.shape[2])
            mask[..., start + 3 :] = -2.0
            return {"q": q * 1.3, "attn_mask": mask}
        turned = pe.roll(1, dims=2) if extra_options["block_index"] == 1 else pe
        return {"v": v * 0.7, "pe": turned}

    patched.set_model_attn1_patch(before)
    patched.set_model_attn1_output_patch(lambda out, extra: out * (1.2 if extra["block_index"] else 0.8))
    return patched


def with_replaced_blocks(model: Model) -> Model:
    """A block whose attention is masked, one that is skipped, and one whose output is scaled."""
    patched = model.clone()

    def masked(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        length = args["img"].shape[1] + args["txt"].shape[1]
        mask = torch.zeros(1, 1, length, length)
        mask[..., :5] = -torch.inf
        return extra["original_block"]({**args, "attn_mask": mask})

    def scaled(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return {"img": 1.1 * extra["original_block"](args)["img"]}

    patched.set_model_patch_replace(masked, "dit", "double_block", 0)
    patched.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 0)
    patched.set_model_patch_replace(scaled, "dit", "single_block", 1)
    return patched


def with_override(model: Model) -> Model:
    patched = model.clone()

    def override(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
        return 0.5 * function(q, k, v, heads, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    return patched


PATCHES: dict[str, Callable[[Model], Model]] = {
    "NAGuidance": node("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "ScaleROPE": node(
        "nodes_rope", "ScaleROPE",
        scale_x=1.5, shift_x=2.0, scale_y=0.5, shift_y=-1.0, scale_t=1.0, shift_t=3.0,
    ),
    "USOStyleReference": with_uso,
    "attention patches": with_attention_patches,
    "replaced blocks": with_replaced_blocks,
    "attention override": with_override,
}  # fmt: skip
REFUSED = {
    "HyperTile": node(
        "nodes_hypertile", "HyperTile", tile_size=64, swap_size=2, max_depth=0, scale_depth=False
    ),
    "TomePatchModel": node("nodes_tomesd", "TomePatchModel", ratio=0.3),
}


def references(method: str | None) -> dict[str, Any]:
    """Two reference latents, the second with odd sides."""
    latents = [drawn(1, 16, 8, 12, seed=11), drawn(1, 16, 7, 5, seed=12)]
    return {"reference_latents": latents, **({"reference_latents_method": method} if method else {})}


def attention_bias() -> dict[str, Any]:
    """As StyleModelApply has it for 4 of the text's 16 tokens: [1, S, S], half precision."""
    tokens = (HEIGHT // 2) * (WIDTH // 2)
    mask = torch.zeros(1, 16 + tokens, 16 + tokens, dtype=torch.float16)
    mask[:, :12, 12:16] = mask[:, 16:, 12:16] = math.log(0.2)
    return {"attention_mask": mask, "attention_mask_img_shape": (HEIGHT // 2, WIDTH // 2)}


CONDITIONS: dict[str, dict[str, Any]] = {
    **{f"references, {method}": references(method) for method in (None, "offset", "index", "uxo")},
    "attention mask": attention_bias(),
    "FluxDisableGuidance": {"guidance": None},
    "no pooled vector": {"pooled_output": None},
}
AT_ZERO: dict[str, Callable[[Model], Model]] = {
    "index_timestep_zero": lambda model: model,
    "FluxKVCache": node("nodes_flux", "FluxKVCache"),
}
"""ComfyUI's own FLUX.1 fails with references at timestep zero, which these use; ours computes them."""

SIZES = {"136x120": (15, 17), "120x136": (17, 15), "128x120": (15, 16)}
"""Odd latents, as EmptySD3LatentImage makes them for these pixels."""


def controlled(model: Model) -> Tensor:
    """The network with ControlNet residuals, fewer than it has blocks, on some of the tokens."""
    network = model.model.diffusion_model
    tokens = (HEIGHT // 2) * (WIDTH // 2)
    control = {
        "input": [drawn(1, tokens, 256, seed=13), None],
        "output": [drawn(1, tokens - 2, 256, seed=14)],
    }
    inputs = {"context": drawn(1, 16, 32, seed=1), "y": drawn(1, 64, seed=2), "guidance": torch.tensor([3.0])}
    x, sigma = drawn(1, 16, HEIGHT, WIDTH, seed=3), torch.tensor([0.6])
    return network(x, sigma, control=control, transformer_options={}, **inputs)


@torch.inference_mode()
def main(pack: str, path: str) -> dict[str, Any]:
    ours_host, _ = load_pack(Path(pack))
    import comfy.sd

    ours, stock = ours_host.load_model(Path(path), "auto", "auto"), comfy.sd.load_diffusion_model(path)
    plain = sampled(stock, conditioning())
    found: dict[str, Any] = {"plain": [0.0, decibels(sampled(ours, conditioning()), plain)]}
    for name, patch in PATCHES.items():
        cfg = 1.0 if patch is with_uso else 2.0  # ComfyUI's patch takes one prompt at a time
        theirs = sampled(patch(stock), conditioning(), cfg=cfg)
        mine = sampled(patch(ours), conditioning(), cfg=cfg)
        found[name] = [decibels(theirs, sampled(stock, conditioning(), cfg=cfg)), decibels(mine, theirs)]
    for name, extra in CONDITIONS.items():
        theirs = sampled(stock, conditioning(**extra))
        found[name] = [decibels(theirs, plain), decibels(sampled(ours, conditioning(**extra)), theirs)]
    at_zero = conditioning(**references("index_timestep_zero"))
    at_step = sampled(ours, conditioning(**references("index")))
    for name, patch in AT_ZERO.items():
        found[name] = [failure(patch, stock, at_zero), decibels(sampled(patch(ours), at_zero), at_step)]
    for name, size in SIZES.items():
        theirs = sampled(stock, conditioning(), size)
        found[name] = [0.0, decibels(sampled(ours, conditioning(), size), theirs)]
    theirs = controlled(stock)
    found["control"] = [0.0, decibels(controlled(ours), theirs)]
    found["refused"] = {
        name: [failure(patch, stock), failure(patch, ours)] for name, patch in REFUSED.items()
    }
    return found


def failure(patch: Callable[[Model], Model], model: Model, positive: list[Any] | None = None) -> str:
    try:
        sampled(patch(model), conditioning() if positive is None else positive)
    except Exception as error:  # what a user of ComfyUI would read
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
