"""What ComfyUI's other nodes make of our MODEL and VAE and of its own, on the same weights: prints JSON.

Run by ComfyUI's Python, in its checkout: python inside_chaining.py PACK MODEL OTHER_MODEL. For each case
[effect, agreement]: the dB between ComfyUI's result with and without the node, and between ours and
ComfyUI's; or [what ComfyUI raises, what ours raises].
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from inside_patches import HEIGHT, WIDTH, conditioning, decibels, drawn
from torch import Tensor

Model = Any
NEGATIVE = [[drawn(1, 16, 32, seed=4), {"pooled_output": drawn(1, 64, seed=5), "guidance": 2.5}]]
EMPTY = [[drawn(1, 16, 32, seed=33), {"pooled_output": drawn(1, 64, seed=34), "guidance": 2.5}]]
ODD = (17, 15)
"""136 pixels high and 120 wide."""


def node(name: str, **inputs: Any) -> Any:
    """The outputs of one of ComfyUI's nodes, old style or new."""
    kind = KINDS[name]
    if hasattr(kind, "define_schema"):
        out = kind.execute(**inputs)
        return out if isinstance(out, tuple) else out.result
    return getattr(kind(), kind.FUNCTION)(**inputs)


KINDS: dict[str, Any] = {}
EXTRAS = (
    "cfg pag slg freelunch torch_compile model_merging model_merging_model_specific model_advanced "
    "differential_diffusion custom_sampler perpneg sag easycache apg tcfg eps mahiro fresca "
    "attention_multiply model_downscale rebatch sd3 flux hunyuan"
).split()


def find_nodes() -> None:
    core = importlib.import_module("nodes")
    KINDS.update(core.NODE_CLASS_MAPPINGS)
    for name in EXTRAS:
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and (hasattr(kind, "define_schema") or hasattr(kind, "FUNCTION")):
                KINDS.setdefault(kind.__name__, kind)


# Latents to start from


def image_latent(size: tuple[int, int] = (HEIGHT, WIDTH), batch: int = 1) -> dict[str, Any]:
    return {"samples": drawn(batch, 16, *size, seed=21)}


def empty(size: tuple[int, int] = (HEIGHT, WIDTH), batch: int = 1, channels: int = 16) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, channels, *size)}


def masked(latent: dict[str, Any], count: int = 1) -> dict[str, Any]:
    """With SetLatentNoiseMask, of other sides than the image's: soft, one for each of `count` images."""
    mask = torch.linspace(0, 1, 40).expand(count, 24, 40) * torch.linspace(1, 0.4, count)[:, None, None]
    return node("SetLatentNoiseMask", samples=latent, mask=mask)[0]


# Sampling


def k_sampler(model: Model, **changed: Any) -> Tensor:
    settings = {
        "seed": 7, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": conditioning(), "negative": NEGATIVE, "latent_image": empty(),
    }  # fmt: skip
    return node("KSampler", model=model, **{**settings, **changed})[0]["samples"]


def advanced(model: Model) -> Tensor:
    """Two KSamplerAdvanced: the noise that the first one leaves, the second one continues."""
    settings = {
        "noise_seed": 7, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": conditioning(), "negative": NEGATIVE,
    }  # fmt: skip
    run = partial(node, "KSamplerAdvanced", model=model, **settings)
    first = run(add_noise="enable", latent_image=empty(), start_at_step=0, end_at_step=2,
                return_with_leftover_noise="enable")[0]  # fmt: skip
    return run(add_noise="disable", latent_image=first, start_at_step=2, end_at_step=10000,
               return_with_leftover_noise="disable")[0]["samples"]  # fmt: skip


def sigmas_of(model: Model, denoise: float = 1.0) -> Tensor:
    return node("BasicScheduler", model=model, scheduler="simple", steps=2, denoise=denoise)[0]


def custom(model: Model, latent: dict[str, Any] | None = None, split: str = "", solver: Any = None) -> Tensor:
    """SamplerCustom; `split` names the half of SplitSigmasDenoise 0.5 that is sampled."""
    sigmas = sigmas_of(model)
    if split:
        sigmas = node("SplitSigmasDenoise", sigmas=sigmas, denoise=0.5)[split == "low"]
    return node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=7, cfg=2.0, positive=conditioning(),
        negative=NEGATIVE, sigmas=sigmas, latent_image=latent or empty(),
        sampler=solver or node("KSamplerSelect", sampler_name="euler")[0],
    )[0]["samples"]  # fmt: skip


def guided(model: Model, guider: str, **inputs: Any) -> Tensor:
    return node(
        "SamplerCustomAdvanced", noise=node("RandomNoise", noise_seed=7)[0], sigmas=sigmas_of(model),
        guider=node(guider, model=model, **inputs)[0], latent_image=empty(),
        sampler=node("KSamplerSelect", sampler_name="euler")[0],
    )[0]["samples"]  # fmt: skip


def dual(model: Model, style: str) -> Tensor:
    second = [[drawn(1, 16, 32, seed=31), {"pooled_output": drawn(1, 64, seed=32), "guidance": 2.5}]]
    return guided(model, "DualCFGGuider", cond1=conditioning(), cond2=second, negative=NEGATIVE,
                  cfg_conds=2.0, cfg_cond2_negative=1.5, style=style)  # fmt: skip


def conditioned(name: str, **inputs: Any) -> Callable[[Model], Tensor]:
    def run(model: Model) -> Tensor:
        return k_sampler(model, positive=node(name, conditioning=conditioning(), **inputs)[0])

    return run


def combined(model: Model, second: str) -> Tensor:
    """Two prompts: one for an area with odd sides in tokens, the other for all of an odd latent."""
    sizes = {"width": 56, "height": 72, "x": 24, "y": 40, "strength": 0.7}
    area = node("ConditioningSetArea", conditioning=NEGATIVE, **sizes)[0]
    if second == "mask":
        mask = torch.ones(1, 20, 30).tril()
        area = node("ConditioningSetMask", conditioning=NEGATIVE, mask=mask, set_cond_area="mask bounds",
                    strength=0.7)[0]  # fmt: skip
    both = node("ConditioningCombine", conditioning_1=conditioning(), conditioning_2=area)[0]
    return k_sampler(model, positive=both, latent_image=empty(ODD))


def upscaled(model: Model, batch: int) -> Tensor:
    """Sampled, LatentUpscaleBy 1.3 to odd sides, sampled again."""
    first = {"samples": k_sampler(model, latent_image=empty((10, 13), batch))}
    larger = node("LatentUpscaleBy", samples=first, upscale_method="bislerp", scale_by=1.3)[0]
    assert larger["samples"].shape[2:] == (13, 17)
    return k_sampler(model, latent_image=masked(larger, 3), denoise=0.6)


def cropped(model: Model) -> Tensor:
    small = node("LatentCrop", samples=image_latent((20, 20), 2), width=136, height=72, x=8, y=40)[0]
    assert small["samples"].shape[2:] == (9, 17)
    return k_sampler(model, latent_image=small, denoise=0.6)


def composed(model: Model) -> Tensor:
    patch = image_latent((7, 5))
    both = node("LatentComposite", samples_to=empty(ODD), samples_from=patch, x=24, y=8, feather=16)[0]
    return k_sampler(model, latent_image=both, denoise=0.5)


def batched(model: Model) -> Tensor:
    """The second and third of a batch of four, with their own noise and masks."""
    part = node("LatentFromBatch", samples=image_latent(ODD, 4), batch_index=1, length=2)[0]
    twice = node("RepeatLatentBatch", samples=masked(part, 2), amount=2)[0]
    return k_sampler(model, latent_image=twice, denoise=0.6)


def patched(name: str, run: Callable[..., Tensor] = k_sampler, **inputs: Any) -> Callable[[Model], Tensor]:
    """Sampled after a node that takes a MODEL and returns one."""
    return lambda model: run(node(name, model=model, **inputs)[0])


def masked_run(model: Model) -> Tensor:
    return k_sampler(model, latent_image=masked(image_latent()), denoise=0.6)


many_steps = partial(k_sampler, steps=4)

CASES: dict[str, tuple[Callable[[Model], Tensor], Callable[[Model], Tensor] | None]] = {
    "ModelSamplingFlux": (
        patched("ModelSamplingFlux", max_shift=2.0, base_shift=0.3, width=1024, height=512), k_sampler),
    "ModelSamplingSD3": (patched("ModelSamplingSD3", shift=2.0), k_sampler),
    "DifferentialDiffusion": (patched("DifferentialDiffusion", masked_run), masked_run),
    "SkipLayerGuidanceDiT": (
        patched("SkipLayerGuidanceDiT", double_layers="1", single_layers="0", scale=3.0, start_percent=0.0,
                end_percent=1.0, rescaling_scale=0.3), k_sampler),
    "SkipLayerGuidanceDiTSimple": (
        patched("SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="1", start_percent=0.0,
                end_percent=1.0), k_sampler),
    "RescaleCFG": (patched("RescaleCFG", multiplier=0.7), k_sampler),
    "CFGZeroStar": (patched("CFGZeroStar"), k_sampler),
    "CFGNorm": (patched("CFGNorm", strength=0.8), k_sampler),
    "CFGOverride": (patched("CFGOverride", cfg=5.0, start_percent=0.0, end_percent=0.6), k_sampler),
    "TCFG": (patched("TCFG"), k_sampler),
    "APG": (patched("APG", eta=0.5, norm_threshold=3.0, momentum=-0.5), k_sampler),
    "Mahiro": (patched("Mahiro"), k_sampler),
    "FreSca": (patched("FreSca", scale_low=0.7, scale_high=1.5, freq_cutoff=3), k_sampler),
    "EpsilonScaling": (patched("EpsilonScaling", scaling_factor=1.05), k_sampler),
    "TemporalScoreRescaling": (patched("TemporalScoreRescaling", tsr_k=0.9, tsr_sigma=1.0), k_sampler),
    "PerpNeg": (patched("PerpNeg", empty_conditioning=EMPTY, neg_scale=1.5), k_sampler),
    "EasyCache": (patched("EasyCacheNode", many_steps, reuse_threshold=2.0,
                          start_percent=0.0, end_percent=1.0, verbose=False), many_steps),
    "LazyCache": (patched("LazyCacheNode", many_steps, reuse_threshold=2.0,
                          start_percent=0.0, end_percent=1.0, verbose=False), many_steps),
    "ModelAttentionBackend": (patched("ModelAttentionBackend", attention="pytorch attention"), None),
    "KSamplerAdvanced": (advanced, None),
    "SamplerCustom": (custom, None),
    "SplitSigmasDenoise, high": (partial(custom, split="high"), custom),
    "SplitSigmasDenoise, low": (partial(custom, latent=image_latent(), split="low"), custom),
    "DualCFGGuider": (partial(dual, style="regular"), None),
    "DualCFGGuider, nested": (partial(dual, style="nested"), partial(dual, style="regular")),
    "PerpNegGuider": (
        lambda model: guided(model, "PerpNegGuider", positive=conditioning(), negative=NEGATIVE, cfg=2.0,
                             empty_conditioning=EMPTY, neg_scale=1.5), None),
    "EmptyLatentImage": (lambda model: k_sampler(model, latent_image=empty(channels=4)), None),
    "LatentUpscaleBy 1.3": (partial(upscaled, batch=1), None),
    "LatentUpscaleBy 1.3, batch": (partial(upscaled, batch=2), None),
    "LatentCrop": (cropped, None),
    "LatentComposite": (composed, lambda model: k_sampler(model, latent_image=empty(ODD), denoise=0.5)),
    "LatentFromBatch": (batched, None),
    "SetLatentNoiseMask": (masked_run, lambda model: k_sampler(
        model, latent_image=image_latent(), denoise=0.6)),
    "ConditioningSetArea": (partial(combined, second="area"), partial(k_sampler, latent_image=empty(ODD))),
    "ConditioningSetMask": (partial(combined, second="mask"), partial(k_sampler, latent_image=empty(ODD))),
    "ConditioningSetAreaPercentage": (
        conditioned("ConditioningSetAreaPercentage", width=0.45, height=0.7, x=0.3, y=0.1, strength=1.0),
        k_sampler),
    "ConditioningSetTimestepRange": (
        lambda model: k_sampler(model, positive=[
            *node("ConditioningSetTimestepRange", conditioning=conditioning(), start=0.0, end=0.5)[0],
            *node("ConditioningSetTimestepRange", conditioning=NEGATIVE, start=0.5, end=1.0)[0]]), k_sampler),
    **{
        f"sampler {name}": (partial(many_steps, sampler_name=name), many_steps)
        for name in ("heun", "dpmpp_2m", "euler_ancestral", "res_multistep", "uni_pc", "lcm", "deis")
    },
}  # fmt: skip
FAILING = {
    "ModelNoiseScale": patched("ModelNoiseScale", noise_scale=0.9),
    "FreeU": patched("FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
    "FreeU_V2": patched("FreeU_V2", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
    "SelfAttentionGuidance": patched("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "PatchModelAddDownscale": patched(
        "PatchModelAddDownscale", block_number=1, downscale_factor=2.0, start_percent=0.0, end_percent=1.0,
        downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic"),
    "UNetSelfAttentionMultiply": patched("UNetSelfAttentionMultiply", q=1.2, k=1.1, v=0.9, out=1.1),
}  # fmt: skip


def merges(one: Model, other: Model) -> dict[str, Callable[[], Tensor]]:
    blocks = {"img_in.": 0.2, "double_blocks.0.": 0.3, "single_blocks.1.": 0.6, "final_layer.": 0.8}
    merged = {
        "ModelMergeSimple": lambda: node("ModelMergeSimple", model1=one, model2=other, ratio=0.3),
        "ModelMergeFlux1": lambda: node("ModelMergeFlux1", model1=one, model2=other, **blocks),
        "ModelMergeBlocks": lambda: node(
            "ModelMergeBlocks", model1=one, model2=other, input=0.2, middle=0.5, out=0.9
        ),
        "ModelMergeSubtract": lambda: node("ModelSubtract", model1=one, model2=other, multiplier=0.2),
        "ModelMergeAdd": lambda: node("ModelAdd", model1=one, model2=other),
    }
    return {name: lambda make=make: k_sampler(make()[0]) for name, make in merged.items()}


def attempt(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # what a user of ComfyUI would read
        return f"{type(error).__name__}: {error}"


def compared(theirs: Any, ours: Any, plain: Tensor | None) -> list[Any]:
    if isinstance(theirs, str) or isinstance(ours, str):
        return ["" if isinstance(result, Tensor) else result for result in (theirs, ours)]
    assert theirs.shape == ours.shape
    return [0.0 if plain is None else decibels(theirs, plain), decibels(ours, theirs)]


def computed(model: Model, truth: Tensor) -> dict[str, float]:
    """For each dtype of ModelComputeDtype the dB to `truth`, ComfyUI's own in float32."""
    found = {}
    for dtype in ("fp32", "bf16", "fp16", "default"):
        result = k_sampler(node("ModelComputeDtype", model=model, dtype=dtype)[0])
        found[dtype] = decibels(result, truth)
    return found


@torch.inference_mode()
def main(pack: str, path: str, other_path: str) -> dict[str, Any]:
    hosts, _ = load_pack(Path(pack))
    logging.disable(logging.INFO)
    find_nodes()
    import comfy.sd

    ours = hosts.load_model(Path(path), "auto", "auto")
    ours_other = hosts.load_model(Path(other_path), "auto", "auto")
    stock, stock_other = (comfy.sd.load_diffusion_model(each) for each in (path, other_path))
    found: dict[str, Any] = {}
    plain: dict[Any, Tensor] = {k_sampler: k_sampler(stock)}
    found["compute dtypes"] = [computed(stock, plain[k_sampler]), computed(ours, plain[k_sampler])]
    for name, (run, baseline) in CASES.items():
        theirs, mine = attempt(partial(run, stock)), attempt(partial(run, ours))
        if baseline is not None and baseline not in plain:
            plain[baseline] = baseline(stock)
        found[name] = compared(theirs, mine, plain.get(baseline))
    for name, run in FAILING.items():
        found[name] = compared(attempt(partial(run, stock)), attempt(partial(run, ours)), plain[k_sampler])
    theirs = merges(stock, stock_other)
    for kind, other in (("", ours_other), (" with a stock MODEL", stock_other)):
        for name, run in merges(ours, other).items():
            found[name + kind] = compared(attempt(theirs[name]), attempt(run), plain[k_sampler])
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
