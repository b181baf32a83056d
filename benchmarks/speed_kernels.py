"""Cases of `bench speed --device cuda`: what fused kernels and recorded steps gain.

`kernels`: each pass of flux_core/fused at FLUX.1's width in bf16 beside torch's operations, for the tokens of
pictures of 1024, 512 and 256 px. `recorded`: a step of FLUX.1 [dev] in full size, as a CUDA graph
(flux_core/graphs.py) beside the same launched one by one, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux_core import fp8, fused, layers
from ..flux_core.graphs import steps_of
from ..flux_core.spec import FLUX_DEV, FluxSpec
from ..flux_core.transformer import FluxTransformer, pack
from . import switches
from .speed_gpu import compiled_or_not, first_words
from .speed_inputs import SIGMA, Inputs, difference, random_model
from .speed_settings import Outcome, Settings, Skipped, Told
from .turns import Run, compare

TOGETHER = 20
"""Launches that are timed at once: one alone is over before the clock has looked."""
TOKENS = (4608, 1536, 768)
"""Of text and image, at 1024, 512 and 256 px."""


def kernels(settings: Settings, spec: FluxSpec | None = None) -> Iterator[Outcome]:
    """A ratio for each kernel and number of tokens, torch's time over the kernel's."""
    if spec is None and settings.device.type != "cuda":
        yield Skipped("kernels", "for --device cuda")
        return
    for tokens in TOKENS[-1:] if settings.quick else TOKENS:
        for name, run in passes(spec or FLUX_DEV, tokens, settings.device).items():
            case = f"kernel-{name}-{tokens}"
            if settings.is_over:
                yield Skipped(case, "the time is over")
                continue
            with switches.kernels(True):
                run()
                if fused._off:
                    yield Skipped(case, "the kernel does not run here")
                    continue
            ours, theirs = _repeated(run, on=True), _repeated(run, on=False)
            yield compare(case, ours, theirs, settings.clock, settings.budget / 20, "theirs by torch")


def passes(spec: FluxSpec, tokens: int, device: torch.device) -> dict[str, Run]:
    """What lies between the products of a block, for a picture (the norm: for two, else torch does it)."""
    hidden, heads, mlp = spec.hidden_size, spec.num_heads, spec.mlp_size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, change, pair = drawn(1, tokens, hidden), drawn(1, tokens, hidden), drawn(2, tokens // 2, hidden)
    shift, scale, gate, *two = drawn(5, 1, 1, hidden).unbind()
    shifts, scales = (torch.cat([one, 2 * one]) for one in two)
    y = drawn(1, tokens, 3 * hidden + mlp)
    rope = layers.rope_table(torch.rand(tokens, 3, device=device), spec.axes_dim, spec.theta)
    norms = [layers.QKNorm(spec.head_dim).to(device, torch.bfloat16).requires_grad_(False) for _ in range(2)]
    text, image = y[:, : tokens // 3, : 3 * hidden], y[:, tokens // 3 :, : 3 * hidden]
    wide = drawn(tokens, hidden + mlp)
    return {
        "norm": lambda: layers.modulated_norm(pair, shifts, scales),
        "residual": lambda: layers.gated(x, gate, change),
        "residual-norm": lambda: layers.gated_and_normed(x, gate, change, shift, scale),
        "heads-1": lambda: layers.queries_keys_values([(y[..., : 3 * hidden], norms[0])], heads, rope),
        "heads-2": lambda: layers.queries_keys_values([(text, norms[0]), (image, norms[1])], heads, rope),
        "gelu": lambda: _beside_gelu(x, y, 3 * hidden),
        "fp8": lambda: fp8.tokens_in_fp8(x[0]),
        "fp8-wide": lambda: fp8.tokens_in_fp8(wide),
    }


def _beside_gelu(attn: Tensor, y: Tensor, plain: int) -> Tensor:
    """As a single block has it (layers.py: SingleStreamBlock)."""
    if fused.serves(y) and (done := fused.beside_gelu(attn, y, plain)) is not None:
        return done
    return torch.cat([attn, F.gelu(y[..., plain:], approximate="tanh")], dim=-1)


def _repeated(run: Run, on: bool) -> Run:
    def many() -> None:
        with switches.kernels(on):
            for _ in range(TOGETHER):
                run()

    return many


def recorded(
    settings: Settings, spec: FluxSpec | None = None, length: int | None = None
) -> Iterator[Outcome]:
    """A ratio for each way of launching and size, the launched step's time over the recorded one's."""
    if spec is None and settings.device.type != "cuda":
        yield Skipped("recorded", "for --device cuda")
        return
    spec = spec or FLUX_DEV
    try:
        model = random_model(spec, torch.bfloat16, settings.device)
        twin, why = compiled_or_not(model)
        for how, one in (("eager", model), ("compiled", twin)):
            if how == "compiled" and why:
                yield Skipped("recorded-compiled", why)
                continue
            for side in (512, 256):
                yield from _recorded(f"recorded-{how}-{side}", one, side, length or spec.txt_length, settings)
    except RuntimeError as error:  # out of memory, or what compiling stumbles over
        yield Skipped("recorded", first_words(error))


def _recorded(
    case: str, model: FluxTransformer, side: int, length: int, settings: Settings
) -> Iterator[Outcome]:
    if settings.is_over:
        yield Skipped(case, "the time is over")
        return
    inputs = Inputs(model, side, length)
    prepared, tokens = model.prepare(inputs.prompt, [SIGMA], inputs.h, inputs.w), pack(inputs.noise)
    with switches.recordings(True):
        step = steps_of(model)
    if step is model:
        yield Skipped(case, "nothing records such a model here")
        return
    for _ in range(2):  # computed and recorded, proven; from then on replayed
        step(tokens, prepared, SIGMA, None)
    found, exact = step(tokens, prepared, SIGMA, None), model(tokens, prepared, SIGMA)
    yield Told(f"{case}: largest difference {difference(found, exact):.1e} of the largest value")
    yield compare(
        case,
        lambda: step(tokens, prepared, SIGMA, None),
        lambda: model(tokens, prepared, SIGMA),
        settings.clock,
        settings.budget / 4,
        "theirs launched one by one",
        warm=True,
    )
