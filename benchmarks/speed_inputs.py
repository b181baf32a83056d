"""Random models, their twins in diffusers, and runs of both: shared by the cases of `bench speed`."""

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
GUIDANCE = 4.0  # 4000 is exact in bfloat16, to which diffusers rounds 1000 * guidance
SIGMA = 0.5


def random_model(spec: FluxSpec, dtype: torch.dtype, device: torch.device) -> FluxTransformer:
    """A transformer with random weights as large as a trained network's."""
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
    """diffusers' transformer with a copy of the weights."""
    with torch.device("meta"):
        twin = diffusers_of_size(model.spec)
    twin.load_state_dict(diffusers_state_dict(model), assign=True)
    return twin.requires_grad_(False).eval()


class Inputs:
    """A random prompt and random noise [batch, 16, side / 8, side / 8] for a model."""

    def __init__(self, model: FluxTransformer, side: int, text_tokens: int, batch: int = 1) -> None:
        spec, dtype, device = model.spec, model.dtype, model.device
        self.h = self.w = side // 8
        txt = torch.randn(1, text_tokens, spec.context_in, device=device, dtype=dtype)
        pooled = torch.randn(1, spec.vec_in, device=device, dtype=dtype)
        self.prompt = Conditioning(txt, pooled, GUIDANCE if spec.guidance_embed else None)
        self.guidance = torch.full((batch,), GUIDANCE, device=device) if spec.guidance_embed else None
        self.noise = torch.randn(batch, 16, self.h, self.w, device=device, dtype=dtype)
        self.ids = position_ids(text_tokens, self.h, self.w).to(device)

    def our_step(self, model: FluxTransformer) -> Run:
        """One step as in a sampling run."""
        prepared, tokens = model.prepare(self.prompt, [SIGMA], self.h, self.w), pack(self.noise)
        return lambda: model(tokens, prepared, SIGMA)

    def timestep(self, sigma: float) -> Tensor:
        """The timestep of each image, made before the loop as in diffusers' pipeline."""
        return torch.full((len(self.noise),), sigma, device=self.noise.device, dtype=self.noise.dtype)

    def their_velocity(self, model: Any, tokens: Tensor, timestep: Tensor) -> Tensor:
        text_tokens = self.prompt.txt.shape[1]
        return model(
            hidden_states=tokens,
            timestep=timestep,
            guidance=self.guidance,
            pooled_projections=self.prompt.pooled.expand(len(tokens), -1),
            encoder_hidden_states=self.prompt.txt.expand(len(tokens), -1, -1),
            txt_ids=self.ids[:text_tokens],
            img_ids=self.ids[text_tokens:],
            return_dict=False,
        )[0]

    def their_step(self, model: nn.Module) -> Run:
        tokens, timestep = pack(self.noise), self.timestep(SIGMA)
        return lambda: self.their_velocity(model, tokens, timestep)

    def our_loop(self, model: FluxTransformer, sigmas: Sequence[float]) -> Run:
        """Euler steps between sigmas, including what is computed once a prompt."""

        def run() -> Tensor:
            request = VelocityRequest(self.prompt, sigmas[:-1], self.h, self.w, len(self.noise))
            velocity = guided_velocity(model, request)
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
    """Largest absolute difference over theirs' largest magnitude."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
