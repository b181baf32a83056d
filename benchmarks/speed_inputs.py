"""What the cases of `bench speed` share: random models with their twins in diffusers, and their runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core.model.spec import Conditioning, FluxSpec
from ..flux_core.model.transformer import FluxTransformer, pack, position_ids, unpack
from ..flux_core.pipeline import VelocityRequest, guided_velocity
from .interleaved import Run
from .reference.models import diffusers_of_size, diffusers_state_dict

FULL = FluxSpec(3072, 24, 1, 2, context_in=4096, vec_in=768, guidance_embed=True)
QUICK = FluxSpec(128, 1, 1, 2, context_in=64, vec_in=32, guidance_embed=True)
MINIATURE = Path("diffusion_models") / "rectiflux-mini-dev.safetensors"
GUIDANCE = 4.0  # 1000 times it is a whole number in bfloat16, to which diffusers rounds it
SIGMA = 0.5


def random_model(spec: FluxSpec, dtype: torch.dtype, device: torch.device) -> FluxTransformer:
    """A transformer with random weights of a trained network's size."""
    with torch.device("meta"):
        model = FluxTransformer(spec)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1.0) if name.endswith("scale") else parameter.normal_(0, 0.02)
    return model


def diffusers_twin(model: FluxTransformer) -> nn.Module:
    """diffusers' transformer with the same weights, each held once more."""
    with torch.device("meta"):
        twin = diffusers_of_size(model.spec)
    twin.load_state_dict(diffusers_state_dict(model), assign=True)
    return twin.requires_grad_(False).eval()


class Inputs:
    """A prompt and noises, drawn for a model."""

    def __init__(self, model: FluxTransformer, side: int, length: int, batch: int = 1) -> None:
        spec, dtype, device = model.spec, model.dtype, model.device
        self.h = self.w = side // 8
        txt = torch.randn(1, length, spec.context_in, device=device, dtype=dtype)
        pooled = torch.randn(1, spec.vec_in, device=device, dtype=dtype)
        self.prompt = Conditioning(txt, pooled, GUIDANCE if spec.guidance_embed else None)
        self.guidance = torch.full((batch,), GUIDANCE, device=device) if spec.guidance_embed else None
        self.noise = torch.randn(batch, 16, self.h, self.w, device=device, dtype=dtype)
        self.ids = position_ids(length, self.h, self.w).to(device)

    def our_step(self, model: FluxTransformer) -> Run:
        """A step as in a run."""
        prepared, tokens = model.prepare(self.prompt, [SIGMA], self.h, self.w), pack(self.noise)
        return lambda: model(tokens, prepared, SIGMA)

    def timestep(self, sigma: float) -> Tensor:
        """As diffusers' pipeline has it: made before the loop, one for each picture."""
        return torch.full((len(self.noise),), sigma, device=self.noise.device, dtype=self.noise.dtype)

    def their_velocity(self, model: Any, tokens: Tensor, timestep: Tensor) -> Tensor:
        length = self.prompt.txt.shape[1]
        return model(
            hidden_states=tokens,
            timestep=timestep,
            guidance=self.guidance,
            pooled_projections=self.prompt.pooled.expand(len(tokens), -1),
            encoder_hidden_states=self.prompt.txt.expand(len(tokens), -1, -1),
            txt_ids=self.ids[:length],
            img_ids=self.ids[length:],
            return_dict=False,
        )[0]

    def their_step(self, model: nn.Module) -> Run:
        tokens, timestep = pack(self.noise), self.timestep(SIGMA)
        return lambda: self.their_velocity(model, tokens, timestep)

    def our_loop(self, model: FluxTransformer, sigmas: Sequence[float]) -> Run:
        """Euler's steps between sigmas, with all that depends on the prompt."""

        def run() -> Tensor:
            asked, rows = sigmas[:-1], len(self.noise)
            velocity = guided_velocity(model, VelocityRequest(self.prompt, asked, self.h, self.w, rows))
            x = self.noise
            for sigma, after in pairwise(sigmas):
                x = x + (after - sigma) * velocity(x, sigma)
            return x

        return run

    def their_loop(self, model: nn.Module, sigmas: Sequence[float]) -> Run:
        timesteps = [self.timestep(sigma) for sigma in sigmas[:-1]]

        def run() -> Tensor:
            x = pack(self.noise)
            for (sigma, after), timestep in zip(pairwise(sigmas), timesteps, strict=True):
                x = x + (after - sigma) * self.their_velocity(model, x, timestep)
            return unpack(x, self.h, self.w)

        return run

    def comfy_step(self, model: Any) -> Run:
        device = self.noise.device
        sigma, guidance = torch.tensor([SIGMA], device=device), torch.tensor([GUIDANCE], device=device)
        txt, pooled = self.prompt.txt, self.prompt.pooled
        return lambda: model(self.noise, sigma, txt, pooled, guidance, transformer_options={})


def difference(ours: Any, theirs: Any) -> float:
    """The largest, over theirs' largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
