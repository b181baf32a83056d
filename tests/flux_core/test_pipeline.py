"""The whole pipeline against diffusers' FluxPipeline on the same weights, and what FluxPipeline has not."""

from __future__ import annotations

from dataclasses import replace
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
from rectiflux.benchmarks.reference.text import (
    CLIP_WIDTH,
    T5_WIDTH,
    TXT_LENGTH,
    clip_model,
    t5_model,
    tokenizer,
)
from rectiflux.flux_core.model.hooks import Hooks, Residuals
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.model.text_encoders import TextEncoders
from rectiflux.flux_core.model.transformer import pack
from rectiflux.flux_core.pipeline import (
    Guidance,
    Models,
    SampleRequest,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    latent_size,
    sample,
    text_to_image,
)
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import SOLVERS, Step
from rectiflux.flux_core.sampling.step_cache import Caching
from torch import Tensor


def models(**sizes: object) -> Models:
    texts = TextEncoders(t5_model(), tokenizer("$A </s>"), clip_model(), tokenizer("<s> $A </s>"), TXT_LENGTH)
    transformer = flux_transformer(**{"context_in": T5_WIDTH, "vec_in": CLIP_WIDTH, **sizes})
    return Models(texts, transformer, autoencoder())


@pytest.mark.parametrize(
    ("width", "height", "batch", "cfg_scale", "steps", "guidance_embed"),
    [
        pytest.param(48, 32, 1, 1.0, 4, True, id="plain"),
        pytest.param(32, 64, 2, 3.0, 3, True, id="batch of two, true CFG"),
        pytest.param(16, 16, 1, 7.5, 8, False, id="one token, no guidance embedder, strong CFG"),
        pytest.param(64, 64, 1, 1.0, 1, False, id="one step"),
    ],
)
def test_agrees_with_diffusers(
    width: int, height: int, batch: int, cfg_scale: float, steps: int, guidance_embed: bool
) -> None:
    ours = models(guidance_embed=guidance_embed)
    image = text_to_image(
        ours,
        "a red circle",
        "blue square",
        width=width,
        height=height,
        steps=steps,
        seed=11,
        guidance=2.5,
        cfg_scale=cfg_scale,
        batch_size=batch,
    )
    positive, negative = (ours.text_encoders.encode([prompt]) for prompt in ("a red circle", "blue square"))
    theirs = diffusers_pipeline(
        diffusers_transformer(ours.transformer), diffusers_autoencoder(ours.autoencoder)
    )(
        prompt_embeds=positive.txt,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.txt,
        negative_pooled_prompt_embeds=negative.pooled,
        true_cfg_scale=cfg_scale,
        guidance_scale=2.5,
        width=width,
        height=height,
        num_inference_steps=steps,
        num_images_per_prompt=batch,
        latents=pack(draw_noise(11, batch, height // 8, width // 8)),
        output_type="pt",
    ).images
    assert image.shape == (batch, 3, height, width)
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.5  # clamping hides little
    assert relative_error(image / 2 + 0.5, theirs) < 1e-5


def test_a_seed_means_the_same_picture_and_another_seed_another() -> None:
    ours = models()
    first, again, other = (
        text_to_image(ours, "a fox", width=16, height=32, steps=2, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1


def test_the_negative_prompt_is_not_read_at_scale_1() -> None:
    ours = models()
    plain, negative = (
        text_to_image(ours, "a fox", words, width=16, height=16, steps=1) for words in ("", "green fox " * 50)
    )
    assert torch.equal(plain, negative)


def test_steps_and_notices_reach_the_caller() -> None:
    steps: list[Step] = []
    notices: list[str] = []
    text_to_image(
        models(),
        "a red fox on a blue square",
        width=32,
        height=16,
        steps=3,
        solver="heun",
        on_step=steps.append,
        on_notice=notices.append,
    )
    assert [(step.index, step.steps, step.denoised.shape) for step in steps] == [
        (i, 3, (1, 16, 2, 4)) for i in range(3)
    ]
    assert notices == ["the prompt is too long for CLIP: 9 tokens, of which it reads the first 7"]


def test_an_interrupt_leaves_the_models_usable() -> None:
    class Interrupted(Exception):
        pass

    def stop(step: Step) -> None:
        raise Interrupted

    ours = models()
    before = text_to_image(ours, "a", width=16, height=16, steps=2)
    with pytest.raises(Interrupted):
        text_to_image(ours, "a", width=16, height=16, steps=2, on_step=stop)
    assert torch.equal(text_to_image(ours, "a", width=16, height=16, steps=2), before)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"width": 40},
            "width and height must be positive multiples of 16, got 40x32; 32x32 and 48x32 are near",
        ),
        ({"height": 0}, "positive multiples of 16, got 32x0; 32x16 is near"),
        ({"width": -16}, "positive multiples of 16, got -16x32; 16x32 is near"),
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"solver": "ddim"}, "solver must be one of euler, heun, .*, euler_ancestral, got 'ddim'"),
        ({"shift": "twice"}, "shift must be one of by size, none, fixed, got 'twice'"),
        ({"cfg_until": 2.0}, "cfg_until must be .* got 2.0"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be finite, got nan"),
        ({"batch_size": 0}, "a batch needs .* got 0"),
        ({"seed": -1}, r"a seed must lie between 0 and 2\^64 - 1, got -1"),
        ({"seed": 2**64}, r"a seed must lie between 0 and 2\^64 - 1, got 18446744073709551616"),
    ],
)
def test_wrong_requests_are_refused_before_a_model_runs(request_: dict, message: str) -> None:
    """The models are not even there."""
    with pytest.raises(ValueError, match=message):
        text_to_image(None, "a", **{"width": 32, "height": 32, **request_})


def test_latent_size() -> None:
    assert latent_size(1024, 768) == (96, 128)


def test_noise_is_what_comfyui_draws() -> None:
    """torch.manual_seed(seed), one torch.randn for the batch; the global generator is left alone."""
    torch.manual_seed(42)
    expected = torch.randn(3, 16, 4, 6)
    torch.manual_seed(5)
    after = torch.randn(1)
    torch.manual_seed(5)
    assert torch.equal(draw_noise(42, 3, 4, 6), expected)
    assert torch.equal(torch.randn(1), after)
    assert torch.isfinite(draw_noise(2**64 - 1, 1, 2, 2)).all()


def test_the_references_noise_is_what_diffusers_draws() -> None:
    """FluxPipeline.prepare_latents in bfloat16; and on the CPU these are ComfyUI's numbers, rounded."""
    ours = draw_noise(42, 2, 6, 4, "reference")
    theirs, _ = FluxPipeline.prepare_latents(
        SimpleNamespace(
            vae_scale_factor=8,
            _pack_latents=FluxPipeline._pack_latents,
            _prepare_latent_image_ids=FluxPipeline._prepare_latent_image_ids,
        ),
        *(2, 16, 48, 32, torch.bfloat16, torch.device("cpu"), torch.Generator("cpu").manual_seed(42)),
    )
    assert ours.dtype == torch.float32
    assert torch.equal(pack(ours), theirs.float())
    assert torch.equal(ours, draw_noise(42, 2, 6, 4).bfloat16().float())
    with pytest.raises(ValueError, match="by the convention comfyui or reference, got 'bfl'"):
        draw_noise(42, 1, 4, 4, "bfl")


def recording(model) -> list[int]:
    """Batch sizes of the model's forward calls, as they come."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


def test_both_halves_of_cfg_share_a_batch_where_they_can() -> None:
    model = flux_transformer()
    rows = recording(model)
    x = draw_noise(3, 2, 4, 6)

    def velocity(negative: Conditioning | None, scale: float) -> Tensor:
        return guided_velocity(model, VelocityRequest(text(1), [0.5], 4, 6, 2, Guidance(negative, scale)))(
            x, 0.5
        )

    v_pos, v_neg = (
        velocity(None, 1.0),
        guided_velocity(model, VelocityRequest(text(2), [0.5], 4, 6, 2))(x, 0.5),
    )
    assert rows == [2, 2]
    expected = v_neg + 3.0 * (v_pos - v_neg)
    assert relative_error(velocity(text(2), 3.0), expected) < 1e-5
    assert rows == [2, 2, 4]
    assert relative_error(velocity(text(2, guidance=None), 3.0), expected) < 1e-5
    assert rows[3:] == [4]
    velocity(text(2, length=8), 3.0)
    velocity(text(2, guidance=1.0), 3.0)
    assert rows[4:] == [2, 2, 2, 2]
    assert torch.equal(velocity(text(2), 1.0), v_pos)


def test_below_a_sigma_the_prompt_goes_alone() -> None:
    """Guided at that sigma and above, the prompt's velocity at its work below, sigmas known or not."""
    model = flux_transformer()
    rows = recording(model)
    x, asked = draw_noise(3, 2, 4, 6), [0.75, 0.5, 0.25]
    whole = guided_velocity(model, VelocityRequest(text(1), asked, 4, 6, 2, Guidance(text(2), 3.0)))
    alone = guided_velocity(model, VelocityRequest(text(1), asked, 4, 6, 2))
    for sigmas in (asked, None):
        until = guided_velocity(model, VelocityRequest(text(1), sigmas, 4, 6, 2, Guidance(text(2), 3.0, 0.5)))
        rows.clear()
        found = [until(x, sigma) for sigma in asked]
        assert rows == [4, 4, 2]
        for v, same, sigma in zip(found, (whole, whole, alone), asked, strict=True):
            assert relative_error(v, same(x, sigma)) < 1e-5
    never = guided_velocity(model, VelocityRequest(text(1), asked, 4, 6, 2, Guidance(text(2), 3.0, 0.9)))
    assert torch.equal(never(x, 0.75), alone(x, 0.75))


def test_texts_that_cannot_share_a_batch_are_guided_alike() -> None:
    """A negative of another length, in a pass of its own, equals the formula on two separate velocities."""
    model = flux_transformer()
    x = draw_noise(3, 1, 4, 4)
    alone = [
        guided_velocity(model, VelocityRequest(c, [0.5], 4, 4, 1))(x, 0.5)
        for c in (text(1), text(2, length=8))
    ]
    both = guided_velocity(model, VelocityRequest(text(1), [0.5], 4, 4, 1, Guidance(text(2, length=8), 4.0)))(
        x, 0.5
    )
    assert relative_error(both, alone[1] + 4.0 * (alone[0] - alone[1])) < 1e-5


def test_pictures_of_a_batch_do_not_mix() -> None:
    """Each picture of a batch, with its own text, is the picture that it is alone."""
    model = flux_transformer()
    texts, negative = text(1, rows=3), text(2)
    noise, sigmas = draw_noise(9, 3, 4, 4), make_sigmas(2, 4)
    zeros = torch.zeros_like(noise)
    together = sample(
        model, SampleRequest(texts, noise, zeros, sigmas, SOLVERS["euler"], Guidance(negative, 2.0))
    )
    for i in range(3):
        one = Conditioning(texts.txt[i : i + 1], texts.pooled[i : i + 1], 3.5)
        alone = sample(
            model,
            SampleRequest(
                one, noise[i : i + 1], zeros[:1], sigmas, SOLVERS["euler"], Guidance(negative, 2.0)
            ),
        )
        assert relative_error(together[i : i + 1], alone) < 1e-5


def test_wrong_conditionings_and_models_are_refused() -> None:
    model = flux_transformer()
    with pytest.raises(ValueError, match="all 3, got 2 texts and 2 pooled"):
        guided_velocity(model, VelocityRequest(text(1, rows=2), [0.5], 4, 4, 3))
    with pytest.raises(ValueError, match="all 2, got 2 texts and 1 pooled"):
        guided_velocity(
            model, VelocityRequest(replace(text(1, rows=2), pooled=text(1).pooled), [0.5], 4, 4, 2)
        )
    wider = replace(text(2), txt=torch.zeros(1, 5, 7))
    with pytest.raises(ValueError, match="width 24, got 7"):
        guided_velocity(model, VelocityRequest(text(1), [0.5], 4, 4, 2, Guidance(wider, 2.0)))
    with pytest.raises(ValueError, match="384 input channels, got 64"):
        guided_velocity(flux_transformer(in_channels=384), VelocityRequest(text(1), [0.5], 4, 4, 1))
    cached = VelocityRequest(
        text(1), [0.5], 4, 4, new_cache=Caching().new_cache, hooks=Hooks(blocks=(Residuals(),))
    )
    with pytest.raises(ValueError, match="step cache"):
        guided_velocity(model, cached)
    noise, sigmas = draw_noise(0, 2, 4, 4), make_sigmas(2, 4)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 16, 4, 4\] and \[1, 16, 4, 4\]"):
        sample(model, SampleRequest(text(1), noise, noise[:1], sigmas, SOLVERS["euler"]))
    with pytest.raises(ValueError, match="start at a sigma above 0, got 0.0"):
        sample(model, SampleRequest(text(1), noise, noise, torch.zeros(2), SOLVERS["euler"]))
    with pytest.raises(ValueError, match="all 2, got 3"):
        sample(
            model,
            SampleRequest(
                text(1), noise, noise, sigmas, SOLVERS["euler"], noise_mask=torch.ones(3, 8, 8), on_step=None
            ),
        )


def test_partial_denoise_starts_from_the_noised_latent() -> None:
    """The first state is (1 - sigma) latent + sigma noise."""
    seen: list[Step] = []
    noise, latent = draw_noise(1, 1, 4, 4), draw_noise(2, 1, 4, 4)
    sigmas = make_sigmas(2, 4, denoise=0.4)
    sample(
        flux_transformer(),
        SampleRequest(text(1), noise, latent, sigmas, SOLVERS["euler"], on_step=seen.append),
    )
    torch.testing.assert_close(seen[0].x, (1 - sigmas[0]) * latent + sigmas[0] * noise)
