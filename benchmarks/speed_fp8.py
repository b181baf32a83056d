"""Case of `bench speed`: what fp8 loses, layer by layer (flux_core/backends/fp8.py says what it is for).

No times, and on any device the same numbers: the relative error of mini-dev's velocity in bf16 with one kind
of layer in fp8, against float32. At each of SIGMAS, on pictures that mini-dev paints of PROMPTS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..flux_core.backends.fp8 import Fp8Linear, to_fp8
from ..flux_core.backends.quantize import quantize_to_fp8
from ..flux_core.model.spec import Conditioning
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import Models, VelocityRequest, draw_noise, guided_velocity
from ..flux_core.sampling.schedule import make_sigmas
from ..miniature.evaluate import PREVIEW_PROMPTS
from .generate import files_of, load_models
from .speed_settings import Outcome, Settings, Skipped, Told

SIGMAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
PROMPTS = PREVIEW_PROMPTS
GUIDANCE = 3.5
SIDE = 16
"""Positions along a latent's side: 128 pixels."""
KINDS = {
    "double blocks, qkv": ("double_blocks.*_attn.qkv",),
    "double blocks, proj": ("double_blocks.*_attn.proj",),
    "double blocks, MLP in": ("double_blocks.*_mlp.0",),
    "double blocks, MLP out": ("double_blocks.*_mlp.2",),
    "single blocks, linear1": ("single_blocks.*.linear1",),
    "single blocks, linear2": ("single_blocks.*.linear2",),
    "modulations": ("*_mod.lin", "*.modulation.lin"),
    "img_in": ("img_in",),
    "final_layer": ("final_layer.linear",),
}
"""Layers, by patterns of their names."""
WHOLE = {"all blocks": ("double_blocks.*", "single_blocks.*"), "every layer": ("*",)}


def fp8_error(settings: Settings) -> Iterator[Outcome]:
    """A line for each kind of layer, for each single block, and for what quantize_to_fp8 chooses."""
    try:
        models = load_models(files_of(settings.models, "dev"))
    except ValueError as error:
        yield Skipped("fp8", str(error))
        return
    measure = Measure(models, few=settings.quick)
    yield Told(f"fp8: bf16 throughout errs by {measure.error(measure.model()):.3f} of the velocity's length")
    blocks = len(models.transformer.single_blocks)
    single = {f"single block {i}": (f"single_blocks.{i}.linear?",) for i in range(blocks)}
    for kind, patterns in {**KINDS, **single, **WHOLE}.items():
        yield Told(f"fp8: {kind} in fp8 {measure.error(measure.model(*patterns)):.3f}")
    chosen = measure.model()
    quantize_to_fp8(chosen)
    yield Told(f"fp8: what quantize_to_fp8 chooses {measure.error(chosen):.3f}")


class Measure:
    """Noised pictures, and the velocities that the model in float32 has there."""

    def __init__(self, models: Models, few: bool) -> None:
        self._exact = models.transformer.eval().requires_grad_(False)
        prompts = PROMPTS[:2] if few else PROMPTS
        self._sigmas = SIGMAS[::3] if few else SIGMAS
        found = models.text_encoders.encode(list(prompts))
        self._prompt = Conditioning(found.txt, found.pooled, GUIDANCE)
        self._noise = draw_noise(0, len(prompts), SIDE, SIDE).to(self._exact.device)
        self._pictures = self._painted(2 if few else 8)
        self._velocities = self._velocity_of(self._exact)

    def model(self, *patterns: str) -> FluxTransformer:
        """The model in bf16, with the layers whose names one of the patterns matches in fp8."""
        twin = copy.deepcopy(self._exact).to(torch.bfloat16)
        for name, layer in list(twin.named_modules()):
            if isinstance(layer, nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns):
                twin.set_submodule(name, Fp8Linear(to_fp8(layer.weight), layer.bias, torch.bfloat16))
        return twin

    def error(self, model: FluxTransformer) -> float:
        """The length of the difference to float32's velocities over theirs, a mean over the sigmas."""
        found = self._velocity_of(model)
        shares = [float((v - e).norm() / e.norm()) for v, e in zip(found, self._velocities, strict=True)]
        return sum(shares) / len(shares)

    def _velocity_of(self, model: FluxTransformer) -> list[Tensor]:
        found = []
        velocity = guided_velocity(
            model, VelocityRequest(self._prompt, self._sigmas, SIDE, SIDE, len(self._noise))
        )
        for sigma in self._sigmas:
            x = (1 - sigma) * self._pictures + sigma * self._noise
            found.append(velocity(x.to(model.dtype), sigma).float())
        return found

    def _painted(self, steps: int) -> Tensor:
        """Pictures by Euler's method."""
        sigmas = make_sigmas(steps, SIDE * SIDE // 4).tolist()
        velocity = guided_velocity(
            self._exact, VelocityRequest(self._prompt, sigmas[:-1], SIDE, SIDE, len(self._noise))
        )
        x = self._noise
        for sigma, after in pairwise(sigmas):
            x = x + (after - sigma) * velocity(x, sigma)
        return x
