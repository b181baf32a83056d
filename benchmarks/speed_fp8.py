"""Case of `bench speed`: the error that fp8 adds, layer by layer (see flux_core/backends/fp8.py); not timed.

The relative error of mini-dev's velocity in bf16 with one kind of layer in fp8, against float32: at each of
SIGMAS, on images that mini-dev generates from PROMPTS. The values are the same on any device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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
from .generate import load_models, model_files
from .speed_settings import Note, Outcome, Settings, Skipped

SIGMAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
PROMPTS = PREVIEW_PROMPTS
GUIDANCE = 3.5
SIDE = 16
"""Side of the latent: 128 pixels."""
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
"""Kind of layer -> patterns of module names."""
WHOLE = {"all blocks": ("double_blocks.*", "single_blocks.*"), "every layer": ("*",)}


def fp8_error(settings: Settings) -> Iterator[Outcome]:
    """A line for each kind of layer, for each single block, and for the choice of quantize_to_fp8."""
    try:
        models = load_models(model_files(settings.models, "dev"))
    except ValueError as error:
        yield Skipped("fp8", str(error))
        return
    measure = VelocityError(models, few=settings.quick)
    yield Note(f"fp8: error of bf16 without fp8 {measure(measure.model()):.3f} of the velocity's norm")
    blocks = len(models.transformer.single_blocks)
    single = {f"single block {i}": (f"single_blocks.{i}.linear?",) for i in range(blocks)}
    for kind, patterns in {**KINDS, **single, **WHOLE}.items():
        yield Note(f"fp8: {kind} in fp8 {measure(measure.model(*patterns)):.3f}")
    chosen = measure.model()
    quantize_to_fp8(chosen)
    yield Note(f"fp8: layers chosen by quantize_to_fp8 {measure(chosen):.3f}")


class VelocityError:
    """Relative error of a model's velocities to float32's, on images noised to each sigma."""

    def __init__(self, models: Models, few: bool) -> None:
        self._exact = models.transformer.eval().requires_grad_(False)
        prompts = PROMPTS[:2] if few else PROMPTS
        self._sigmas = SIGMAS[::3] if few else SIGMAS
        encoded = models.text_encoders.encode(list(prompts))
        self._prompt = Conditioning(encoded.txt, encoded.pooled, GUIDANCE)
        self._noise = draw_noise(0, len(prompts), SIDE, SIDE).to(self._exact.device)
        self._latents = self._generate(2 if few else 8)
        self._reference = self._velocities(self._exact)

    def __call__(self, model: FluxTransformer) -> float:
        """Norm of the difference over the norm of float32's velocities, a mean over the sigmas."""
        pairs = zip(self._velocities(model), self._reference, strict=True)
        errors = [float((v - exact).norm() / exact.norm()) for v, exact in pairs]
        return sum(errors) / len(errors)

    def model(self, *patterns: str) -> FluxTransformer:
        """A copy in bf16, with fp8 in the linear layers whose names match one of the patterns."""
        twin = copy.deepcopy(self._exact).to(torch.bfloat16)
        for name, layer in list(twin.named_modules()):
            if isinstance(layer, nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns):
                twin.set_submodule(name, Fp8Linear(to_fp8(layer.weight), layer.bias, torch.bfloat16))
        return twin

    def _velocities(self, model: FluxTransformer) -> list[Tensor]:
        velocity = guided_velocity(model, self._request(self._sigmas))
        noised = [(1 - sigma) * self._latents + sigma * self._noise for sigma in self._sigmas]
        pairs = zip(noised, self._sigmas, strict=True)
        return [velocity(x.to(model.dtype), sigma).float() for x, sigma in pairs]

    def _generate(self, steps: int) -> Tensor:
        """Latents after Euler steps."""
        sigmas = make_sigmas(steps, SIDE * SIDE // 4).tolist()
        velocity = guided_velocity(self._exact, self._request(sigmas[:-1]))
        x = self._noise
        for sigma, after in pairwise(sigmas):
            x = x + (after - sigma) * velocity(x, sigma)
        return x

    def _request(self, sigmas: Sequence[float]) -> VelocityRequest:
        return VelocityRequest(self._prompt, sigmas, SIDE, SIDE, len(self._noise))
