"""Cases of `bench speed`: the transformer, small and in FLUX.1's width, against diffusers and ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux_core.backends.cpu_int8 import Int8Linear, quantize_int8
from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.backends.quantize import quantize_to_int8
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.sampling.schedule import make_sigmas
from ..flux_core.weights import load_transformer
from .footprint import Watch, held
from .interleaved import compare
from .speed_comfy import against_comfy
from .speed_inputs import FULL, MINIATURE, QUICK, Inputs, difference, diffusers_twin, random_model
from .speed_settings import NO_BFLOAT16, Outcome, Settings, Skipped, Told, knows_bfloat16


def miniature(settings: Settings) -> Iterator[Outcome]:
    """Eight steps of the shipped miniature at 128 px, with all that depends on the prompt."""
    file = settings.models / MINIATURE
    if not file.is_file():
        yield Skipped("miniature", f"there is no {file}")
        return
    model = load_transformer(file, torch.float32, settings.device)
    twin = diffusers_twin(model)
    pack_weights(model)
    inputs = Inputs(model, 128, 32)
    sigmas = make_sigmas(2 if settings.quick else 8, inputs.h * inputs.w // 4).tolist()
    ours, theirs = inputs.our_loop(model, sigmas), inputs.their_loop(twin, sigmas)
    yield Told(f"miniature: largest difference {difference(ours(), theirs()):.1e} of the largest value")
    yield compare("miniature", ours, theirs, settings.clock, settings.budget)
    yield from against_comfy("miniature", model, inputs, settings)


def full_width(settings: Settings) -> Iterator[Outcome]:
    """A step of 1 double and 2 single blocks, 512 text tokens, at 256 and 512 px: fp32, bf16, int8.

    int8 against diffusers in bf16, or in fp32 where the processor would take minutes for bf16.
    """
    spec, sides = (QUICK, (64,)) if settings.quick else (FULL, (256, 512))
    length = 16 if settings.quick else 512
    forms = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if not settings.quick and not knows_bfloat16(settings.device):
        del forms["bf16"]
        yield Skipped("full-bf16", NO_BFLOAT16)
    for name, dtype in forms.items():
        model = random_model(spec, dtype, settings.device)
        twin = diffusers_twin(model)
        with Watch() as watch:
            before = held().anonymous
            pack_weights(model)
        held_bytes = sum(t.nbytes for t in twin.parameters())
        more = watch.most.anonymous - before
        yield Told(
            f"full-{name}: packing {held_bytes / 1e9:.2f} GB took {more / 1e9:.2f} GB more at its peak"
        )
        for side in sides:
            case = f"full-{name}-{side}"
            if settings.is_over:
                yield Skipped(case, "the time is over")
                continue
            inputs = Inputs(model, side, length)
            run, theirs = inputs.our_step(model), inputs.their_step(twin)
            yield Told(f"{case}: largest difference {difference(run(), theirs()):.1e} of the largest value")
            yield compare(case, run, theirs, settings.clock, settings.budget, warm=True)
            yield from against_comfy(case, model, inputs, settings)
        if name == next(iter(forms)):
            yield from _int8(model, twin, sides, length, settings)
        del model, twin


def _int8(
    model: FluxTransformer, twin: nn.Module, sides: tuple[int, ...], length: int, settings: Settings
) -> Iterator[Outcome]:
    """The same model in int8 against diffusers as it is; the model's packed layers are given up for it."""
    if settings.device.type != "cpu":
        yield Skipped("full-int8", "int8 is for CPUs")
        return
    if settings.is_over:
        yield Skipped("full-int8", "the time is over")
        return
    state, dtype = model.state_dict(), model.dtype
    told = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    model = FluxTransformer(model.spec).to(dtype).requires_grad_(False).eval()
    model.load_state_dict(state, assign=True)
    del state
    quantize_to_int8(model)
    pack_weights(model)
    for side in sides:
        inputs = Inputs(model, side, length)
        run, theirs, case = inputs.our_step(model), inputs.their_step(twin), f"full-int8-{side}"
        exact = theirs()
        error = float((run().float() - exact.float()).norm() / exact.float().norm())
        included = " (bf16 against bf16 included)" if told == "bf16" else ""
        yield Told(f"{case}: the velocity's error is {error:.4f} of its length{included}")
        yield compare(case, run, theirs, settings.clock, settings.budget, f"theirs in {told}", warm=True)


def int8_error(settings: Settings) -> Iterator[Outcome]:
    """No time: what int8 loses in one layer, on random, outlier-heavy and the miniature's weights."""
    width = 256 if settings.quick else 3072
    x, weight = torch.randn(256, width), torch.randn(width, width) * width**-0.5
    heavy, columns = weight.clone(), torch.randperm(width)[: max(1, width // 100)]
    heavy[:, columns] *= 20
    kinds = {"random weights": (weight, x), "outliers (20 x in a hundredth of the columns)": (heavy, x)}
    x_heavy = x.clone()
    x_heavy[:, columns] *= 20
    kinds["outliers in the inputs"] = (weight, x_heavy)
    if (settings.models / MINIATURE).is_file():
        block: Any = load_transformer(settings.models / MINIATURE, torch.float32).single_blocks[0]
        kinds["the miniature's linear1, random inputs"] = (block.linear1.weight, torch.randn(256, 192))
    for kind, (w, inputs) in kinds.items():
        exact = F.linear(inputs, w)
        int8 = _relative(Int8Linear(quantize_int8(w), None, w.dtype)(inputs), exact)
        bf16 = _relative(F.linear(inputs.bfloat16(), w.bfloat16()).float(), exact)
        yield Told(f"error {kind}: int8 {int8:.4f}, bf16 {bf16:.4f} of the outputs' length")


def _relative(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())
