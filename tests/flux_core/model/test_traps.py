"""Known mistakes of FLUX.1 implementations, each tested where all parts meet.

The group law of the shift and its formula are in test_schedule.py; the swapped halves of the last modulation
in weights/test_formats.py (diffusers' folders against diffusers) and lora/test_conventions.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from rectiflux.benchmarks.reference.models import (
    autoencoder,
    diffusers_autoencoder,
    diffusers_pipeline,
    diffusers_transformer,
    flux_transformer,
    relative_error,
    text,
)
from rectiflux.benchmarks.reference.text import CLIP_WIDTH, T5_WIDTH, clip_model, t5_model, tokenizer
from rectiflux.flux_core.model.spec import FluxSpec
from rectiflux.flux_core.model.text_encoders import NO_PADDING, TextEncoders
from rectiflux.flux_core.model.transformer import FluxTransformer, pack
from rectiflux.flux_core.pipeline import Models, draw_noise, text_to_image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ONE_BLOCK = {"depth": 1, "depth_single": 1, "context_in": T5_WIDTH, "vec_in": CLIP_WIDTH}


def text_encoders(length: int = 512) -> TextEncoders:
    return TextEncoders(t5_model(), tokenizer("$A </s>"), clip_model(), tokenizer("<s> $A </s>"), length)


# Shifting twice


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (64, 256), (512, 384)])
def test_the_network_is_evaluated_at_the_sigmas_of_diffusers(width: int, height: int, guidance: bool) -> None:
    """From the pipeline's entry to the network's: shifted once for [dev], not at all for [schnell]."""
    ours = Models(text_encoders(9), flux_transformer(**ONE_BLOCK, guidance_embed=guidance), autoencoder())
    theirs = diffusers_transformer(ours.transformer)
    pipeline = diffusers_pipeline(theirs, diffusers_autoencoder(ours.autoencoder), shifted=guidance)
    sigmas: tuple[list[float], list[float]] = [], []
    ours.transformer.register_forward_pre_hook(lambda _, given: sigmas[0].append(float(given[2])))
    theirs.register_forward_pre_hook(
        lambda _, given, named: sigmas[1].append(float(named["timestep"])), with_kwargs=True
    )
    shift = "by size" if guidance else "none"
    text_to_image(ours, "a fox", width=width, height=height, steps=4, shift=shift)
    prompt = ours.text_encoders.encode(["a fox"])
    pipeline(
        prompt_embeds=prompt.txt,
        pooled_prompt_embeds=prompt.pooled,
        width=width,
        height=height,
        num_inference_steps=4,
        latents=pack(draw_noise(0, 1, height // 8, width // 8)),
        output_type="latent",
    )
    assert sigmas[0] == pytest.approx(sigmas[1], abs=1e-6)
    assert len(sigmas[0]) == 4 and sigmas[0][0] == 1.0


# Positions in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_above_256_stay_distinct(dtype: torch.dtype) -> None:
    """bfloat16 has no 257. Rotary angles of a latent 300 tokens wide: column * 10000^(-2i/14), in Python."""
    model = flux_transformer().to(dtype)
    assert model.spec.axes_dim == (4, 14, 14)
    cos, sin = model.prepare(text(1), [0.5], 2, 600).rope
    columns = torch.arange(300, dtype=torch.float64)[:, None]
    angle = columns * torch.tensor([10_000 ** (-2 * i / 14) for i in range(7)], dtype=torch.float64)
    for ours, exact in ((cos, angle.cos()), (sin, angle.sin())):
        torch.testing.assert_close(ours[0, 0, 5:, 9:, 0].double(), exact, rtol=0, atol=1e-7)


def test_a_bfloat16_model_distinguishes_columns_256_and_257() -> None:
    """Equal tokens in different columns: their velocities differ as in float32."""
    model = flux_transformer(depth=1, depth_single=1)
    tokens = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3)).expand(1, 260, 64)

    def difference(model: FluxTransformer) -> Tensor:
        v = model(tokens, model.prepare(text(1), [0.5], 2, 520), 0.5).float()
        return (v[0, 257] - v[0, 256]).abs().max()

    exact = difference(model)
    assert exact > 0
    rough = difference(model.to(torch.bfloat16))
    assert rough > 0.2 * exact


# Sigma and guidance in bfloat16


@pytest.mark.parametrize("sigma", [0.6, 0.123, 0.997])
@pytest.mark.parametrize("guidance", [3.3, 2.6])
def test_a_bfloat16_model_embeds_sigma_and_guidance_unrounded(sigma: float, guidance: float) -> None:
    """cos and sin of 1000 value 10000^(-i/128) in Python's floats, to the last bit of bfloat16 (2^-9)."""
    model = flux_transformer().to(torch.bfloat16)
    assert model.guidance_in is not None
    seen: list[Tensor] = []
    for part in (model.time_in, model.guidance_in):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.prepare(text(1, guidance=guidance), [sigma], 4, 4)
    for value, found in zip((sigma, guidance), seen, strict=True):
        angles = [1000 * value * 10_000 ** (-i / 128) for i in range(128)]
        exact = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
        assert found.dtype == torch.bfloat16
        assert (found[0].double() - exact).abs().max() < 2**-9 + 1e-3  # float32 has the angle within 2e-4
        rounded = 1000 * float(torch.tensor(value).bfloat16())
        assert abs(math.cos(rounded) - exact[0]) > 0.01, "rounding first would be detected"


def test_a_bfloat16_model_is_as_accurate_at_sigmas_that_bfloat16_rounds() -> None:
    """At 0.6 and 3.3 as close to float32 as at 0.5 and 3.5, which bfloat16 represents exactly."""
    model, rough = flux_transformer(), flux_transformer().to(torch.bfloat16)
    tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3))
    for sigma, guidance in ((0.5, 3.5), (0.6, 3.3)):
        prompt = text(1, guidance=guidance)
        exact, found = (m(tokens, m.prepare(prompt, [sigma], 4, 4), sigma) for m in (model, rough))
        assert relative_error(found.float(), exact) < 0.05


# T5's padding


def diffusers_t5(prompt: str, length: int) -> Tensor:
    """FluxPipeline's own encoding of a prompt, with the same tokenizer."""
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("$A </s>"), pad_token="<pad>")
    t5 = t5_model()
    return FluxPipeline._get_t5_prompt_embeds(
        SimpleNamespace(
            tokenizer_2=words, text_encoder_2=t5, text_encoder=t5, _execution_device=torch.device("cpu")
        ),
        prompt,
        max_sequence_length=length,
    )


@pytest.mark.parametrize(
    ("variant", "length"),
    [({"guidance_embed": True}, 512), ({}, 256), ({"guidance_embed": True, "in_channels": 384}, 128)],
    ids=["dev", "schnell", "Fill"],
)
def test_padding_is_not_masked_as_in_diffusers(variant: dict, length: int) -> None:
    """Each variant's length; with a mask the prompt's own tokens would differ."""
    spec = FluxSpec(64, 2, 1, 1, context_in=T5_WIDTH, vec_in=CLIP_WIDTH, **variant)
    assert spec.txt_length == length
    prompt, encoders = "a red fox", text_encoders()
    ours = encoders.encode([prompt], txt_length=spec.txt_length).txt
    assert ours.shape == (1, length, T5_WIDTH)
    assert torch.equal(ours, diffusers_t5(prompt, length))
    ids = encoders.t5_ids([prompt], length)
    masked = encoders.t5(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert relative_error(ours[:, :4], masked[:, :4]) > 0.01


def test_no_padding_equals_a_mask() -> None:
    """Four tokens: diffusers' values for that length, and those of masked padding."""
    encoders = text_encoders()
    own = encoders.encode(["a red fox"], txt_length=NO_PADDING).txt
    assert torch.equal(own, diffusers_t5("a red fox", 4))
    ids = encoders.t5_ids(["a red fox"], 512)
    masked = encoders.t5(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert relative_error(own, masked[:, :4]) < 1e-5
