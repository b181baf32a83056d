"""Cases of `bench speed`: the transformer, small and at FLUX.1's width, against diffusers and ComfyUI."""

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
from .footprint import MemoryPeak, process_memory
from .interleaved import Effort, compare
from .speed_comfy import against_comfy
from .speed_inputs import FULL, MINIATURE, QUICK, Inputs, difference, diffusers_twin, random_model
from .speed_settings import (
    NO_BFLOAT16,
    TIME_IS_UP,
    Note,
    Outcome,
    Settings,
    Skipped,
    supports_bfloat16,
)


def miniature(settings: Settings) -> Iterator[Outcome]:
    """Eight steps of mini-dev at 128 px in fp32, including what is computed once a prompt."""
    file = settings.models / MINIATURE
    if not file.is_file():
        yield Skipped("miniature", f"{file} is missing")
        return
    model = load_transformer(file, torch.float32, settings.device)
    twin = diffusers_twin(model)
    pack_weights(model)
    inputs = Inputs(model, 128, 32)
    sigmas = make_sigmas(2 if settings.quick else 8, inputs.h * inputs.w // 4).tolist()
    ours, theirs = inputs.our_loop(model, sigmas), inputs.their_loop(twin, sigmas)
    yield Note(f"miniature: largest difference {difference(ours(), theirs()):.1e} of the largest value")
    yield compare("miniature", ours, theirs, settings.clock, Effort(settings.budget))
    yield from against_comfy("miniature", model, inputs, settings)


def full_width(settings: Settings) -> Iterator[Outcome]:
    """A step of 1 double and 2 single blocks, 512 text tokens, at 256 and 512 px: fp32, bf16, int8.

    int8 is compared with diffusers in bf16, or in fp32 where the processor would take minutes for bf16.
    """
    spec, sides = (QUICK, (64,)) if settings.quick else (FULL, (256, 512))
    text_tokens = 16 if settings.quick else 512
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if not settings.quick and not supports_bfloat16(settings.device):
        del dtypes["bf16"]
        yield Skipped("full-bf16", NO_BFLOAT16)
    int8_against = "bf16" if supports_bfloat16(settings.device) else "fp32"
    for name, dtype in dtypes.items():
        model = random_model(spec, dtype, settings.device)
        twin = diffusers_twin(model)
        yield packing_peak(f"full-{name}", model)
        for side in sides:
            case = f"full-{name}-{side}"
            if settings.is_time_up:
                yield Skipped(case, TIME_IS_UP)
                continue
            inputs = Inputs(model, side, text_tokens)
            run, theirs = inputs.our_step(model), inputs.their_step(twin)
            yield Note(f"{case}: largest difference {difference(run(), theirs()):.1e} of the largest value")
            yield compare(case, run, theirs, settings.clock, Effort(settings.budget, warm=True))
            yield from against_comfy(case, model, inputs, settings)
        if name == int8_against:
            yield from _int8(model, twin, sides, text_tokens, settings)
        del model, twin


def packing_peak(case: str, model: FluxTransformer) -> Note:
    """Pack the model's weights and report the most memory that packing added meanwhile."""
    size = sum(t.nbytes for t in model.parameters())
    with MemoryPeak() as peak:
        before = process_memory().anonymous
        pack_weights(model)
    added = peak.highest.anonymous - before
    return Note(f"{case}: packing {size / 1e9:.2f} GB took {added / 1e9:.2f} GB more at its peak")


def _int8(
    model: FluxTransformer, twin: nn.Module, sides: tuple[int, ...], text_tokens: int, settings: Settings
) -> Iterator[Outcome]:
    """The same weights in int8 against diffusers' unquantized model; unpacks the model's layers."""
    if settings.device.type != "cpu":
        yield Skipped("full-int8", "int8 layers run on CPUs only")
        return
    if settings.is_time_up:
        yield Skipped("full-int8", TIME_IS_UP)
        return
    state, dtype = model.state_dict(), model.dtype
    dtype_name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    model = FluxTransformer(model.spec).to(dtype).requires_grad_(False).eval()
    model.load_state_dict(state, assign=True)
    del state
    quantize_to_int8(model)
    pack_weights(model)
    for side in sides:
        inputs = Inputs(model, side, text_tokens)
        run, theirs, case = inputs.our_step(model), inputs.their_step(twin), f"full-int8-{side}"
        error = _relative_norm(run().float(), theirs().float())
        included = " (bf16 against bf16 included)" if dtype_name == "bf16" else ""
        yield Note(f"{case}: the velocity's error is {error:.4f} of its norm{included}")
        effort = Effort(settings.budget, warm=True)
        yield compare(case, run, theirs, settings.clock, effort, f"theirs in {dtype_name}")


def int8_error(settings: Settings) -> Iterator[Outcome]:
    """The error of one int8 layer on random, outlier-heavy and the miniature's weights; not timed."""
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
        int8 = _relative_norm(Int8Linear(quantize_int8(w), None, w.dtype)(inputs), exact)
        bf16 = _relative_norm(F.linear(inputs.bfloat16(), w.bfloat16()).float(), exact)
        yield Note(f"error {kind}: int8 {int8:.4f}, bf16 {bf16:.4f} of the output's norm")


def _relative_norm(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())
