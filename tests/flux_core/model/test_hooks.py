"""What attaches to the block loop: block hooks, attention hooks, token groups, biases, extra channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference.models import (
    SPEC,
    diffusers_transformer,
    flux_transformer,
    relative_error,
    text,
)
from rectiflux.flux_core.model.hooks import (
    NO_HOOKS,
    Finished,
    Hooks,
    Place,
    Residuals,
    RunBlock,
    Streams,
    Tap,
)
from rectiflux.flux_core.model.layers import Shared
from rectiflux.flux_core.model.modulation import per_token
from rectiflux.flux_core.model.spec import Conditioning, TextSpan
from rectiflux.flux_core.model.transformer import Evaluation, FluxTransformer, TokenGroup, pack
from rectiflux.flux_core.pipeline import Guidance, VelocityRequest, guided_velocity
from torch import Tensor

H, W, L, N, HIDDEN = 4, 6, 5, 6, SPEC.hidden_size
SIGMA = 0.6
PLACES = [*(("double", i) for i in range(SPEC.depth)), *(("single", i) for i in range(SPEC.depth_single))]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> FluxTransformer:
    return flux_transformer()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = drawn(2, N, SPEC.in_channels)


def velocity(model: FluxTransformer, hooks: Hooks = NO_HOOKS, **inputs: Any) -> Tensor:
    return model(TOKENS, model.prepare(replace(text(1), **inputs), [SIGMA], H, W), SIGMA, hooks)


def theirs(model: FluxTransformer, tokens: Tensor, image_ids: Tensor, **inputs: Any) -> Tensor:
    """diffusers' velocity, with position ids and ControlNet residuals of the caller's."""
    prompt, rows = text(1), len(tokens)
    return diffusers_transformer(model)(
        hidden_states=tokens,
        encoder_hidden_states=prompt.txt.expand(rows, -1, -1),
        pooled_projections=prompt.pooled.expand(rows, -1),
        timestep=torch.full((rows,), SIGMA),
        guidance=torch.full((rows,), 3.5),
        img_ids=image_ids,
        txt_ids=torch.zeros(L, 3),
        return_dict=False,
        **inputs,
    )[0]


def grid(h: int, w: int, index: float = 0.0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.full_like(rows, index), rows, columns], -1).reshape(-1, 3).float()


# Block hooks


def test_hooks_see_every_block_in_order_and_change_nothing_by_themselves(model: FluxTransformer) -> None:
    seen: list[Any] = []

    def watch(at: Place, streams: Streams, block: RunBlock) -> Streams:
        out = block(streams)
        seen.append((at.kind, at.index))
        assert (at.txt_length, at.generated) == (L, N) and at.image(out).shape == (2, N, HIDDEN)
        assert (streams.txt is None) == (at.kind == "single")
        return out

    assert torch.equal(velocity(model, Hooks(blocks=(watch, watch))), velocity(model))
    assert seen == [place for place in PLACES for _ in range(2)]


def test_a_block_is_replaced_and_the_first_hook_is_outermost(model: FluxTransformer) -> None:
    def skip(at: Place, streams: Streams, block: RunBlock) -> Streams:
        return streams if (at.kind, at.index) == ("single", 1) else block(streams)

    shorter = flux_transformer(depth_single=2)
    kept = {n: p for n, p in model.state_dict().items() if not n.startswith("single_blocks.1.")}
    shorter.load_state_dict({n.replace("single_blocks.2.", "single_blocks.1."): p for n, p in kept.items()})
    assert relative_error(velocity(model, Hooks(blocks=(skip,))), velocity(shorter)) < 1e-6
    tap = Tap((("single", 1),))
    velocity(model, Hooks(blocks=(tap, skip)))
    before = Tap((("single", 0),))
    velocity(model, Hooks(blocks=(before,)))
    assert torch.equal(tap.states["single", 1], before.states["single", 0])


def test_finishing_early_skips_the_rest(model: FluxTransformer) -> None:
    tap, called = Tap((("double", 0), ("single", 0)), stop=True), []

    def count(at: Place, streams: Streams, block: RunBlock) -> Streams:
        called.append(at)
        return block(streams)

    result = velocity(model, Hooks(blocks=(tap, count)))
    assert len(called) == SPEC.depth + 1 and set(tap.states) == set(tap.places)
    last = model.prepare(text(1), [SIGMA], H, W).at(SIGMA).last
    assert torch.allclose(result, model.final_layer(tap.states["single", 0], last), atol=1e-6)
    with pytest.raises(TypeError, match="outermost"):
        velocity(model, Hooks(blocks=(count, lambda at, streams, block: Finished(streams.img))))


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (2, 3), (1, 0)])
def test_control_residuals_agree_with_diffusers(counts: tuple[int, int], cyclic: bool) -> None:
    """InstantX's placement, and XLabs's, which repeats (in diffusers for double blocks alone)."""
    model = flux_transformer(depth=5)
    double, single = ([drawn(2, N, HIDDEN, seed=i + 9 * j) for i in range(n)] for j, n in enumerate(counts))
    ours = velocity(model, Hooks(blocks=(Residuals(double, [] if cyclic else single, cyclic),)))
    expected = theirs(
        model,
        TOKENS,
        grid(H, W),
        controlnet_block_samples=double,
        controlnet_single_block_samples=None if cyclic or not single else single,
        controlnet_blocks_repeat=cyclic,
    )
    assert relative_error(ours, expected) < 1e-5


# Attention hooks


def test_attention_hooks(model: FluxTransformer) -> None:
    plain = velocity(model)
    same = Hooks(qkv=(lambda at, state: state,), output=(lambda at, out: out,))
    assert relative_error(velocity(model, same), plain) < 1e-5
    scaled = Hooks(qkv=(lambda at, s: s._replace(q=2 * s.q),), output=(lambda at, out: 0.5 * out,))
    halved = Hooks(
        qkv=(lambda at, s: s._replace(k=2 * s.k),),
        attention=lambda at, compute: lambda q, k, v, bias=None: 0.5 * compute(q, k, v, bias),
    )
    assert relative_error(velocity(model, scaled), velocity(model, halved)) < 1e-5
    assert relative_error(velocity(model, scaled), plain) > 0.01


def test_positions_and_bias_can_be_replaced(model: FluxTransformer) -> None:
    """In an attention hook, and by a block hook for its block alone."""
    bias = drawn(1, 1, L + N, L + N)
    expected = velocity(model, bias=bias)
    assert relative_error(expected, velocity(model)) > 0.01
    by_qkv = Hooks(qkv=(lambda at, state: state._replace(bias=bias),))
    by_block = Hooks(blocks=(lambda at, streams, block: block(streams, bias=bias),))
    for hooks in (by_qkv, by_block):
        assert relative_error(velocity(model, hooks), expected) < 1e-5

    shifted = grid(H, W)
    shifted[:, 1] += 3
    rope = model.rope(L, 0, 0, [TokenGroup(TOKENS, shifted)])
    ours = velocity(model, Hooks(blocks=(lambda at, streams, block: block(streams, rope=rope),)))
    assert relative_error(ours, theirs(model, TOKENS, shifted)) < 1e-5


# Inputs


def test_references_agree_with_diffusers(model: FluxTransformer) -> None:
    """Two groups behind the image, as FluxKontextPipeline concatenates them; the velocity is the image's."""
    groups = [
        TokenGroup(drawn(1, 4, SPEC.in_channels, seed=3), grid(4, 4, index=1.0)),
        TokenGroup(drawn(2, 3, SPEC.in_channels, seed=4), grid(2, 6, index=2.0)),
    ]
    every = torch.cat([TOKENS, *(group.tokens.expand(2, -1, -1) for group in groups)], dim=1)
    ids = torch.cat([grid(H, W), *(group.ids for group in groups)])
    ours = velocity(model, groups=tuple(groups))
    assert ours.shape == TOKENS.shape
    assert relative_error(ours, theirs(model, every, ids)[:, :N]) < 1e-5


def test_a_reference_has_its_own_timestep(model: FluxTransformer) -> None:
    tokens, ids = drawn(1, 4, SPEC.in_channels, seed=3), grid(4, 4, index=1.0)
    group = TokenGroup(tokens, ids)
    at_step = velocity(model, groups=(group,))
    assert relative_error(velocity(model, groups=(replace(group, sigma=SIGMA),)), at_step) < 1e-6
    at_zero = velocity(model, groups=(replace(group, sigma=0.0),))
    assert relative_error(at_zero, at_step) > 1e-3

    prepared = model.prepare(replace(text(1), groups=(group,)), [SIGMA, 0.0], H, W)
    step, zero = prepared.at(SIGMA), prepared.at(0.0)
    double = tuple(
        (per_token([(N, img), (4, other)]), txt)
        for (img, txt), (other, _) in zip(step.double, zero.double, strict=True)
    )
    single = tuple(
        per_token([(L + N, mod), (4, other)]) for mod, other in zip(step.single, zero.single, strict=True)
    )
    img = torch.cat([model.img_in(TOKENS), prepared.references[0].expand(2, -1, -1)], dim=1)
    evaluation = Evaluation(
        prepared.txt.expand(2, -1, -1),
        replace(step, double=double, single=single),
        Shared(prepared.rope),
        generated=N,
    )
    assert relative_error(at_zero, model.run_blocks(img, evaluation)) < 1e-5


def test_a_bias_of_minus_infinity_removes_a_reference(model: FluxTransformer) -> None:
    """Log of a strength on its columns: 0 removes it, 1 changes nothing."""
    group = TokenGroup(drawn(1, 4, SPEC.in_channels, seed=3), grid(4, 4, index=1.0))
    bias = torch.zeros(1, 1, L + N + 4, L + N + 4)
    assert (
        relative_error(velocity(model, groups=(group,), bias=bias), velocity(model, groups=(group,))) < 1e-5
    )
    bias[..., : L + N, L + N :] = -torch.inf
    assert relative_error(velocity(model, groups=(group,), bias=bias), velocity(model)) < 1e-5


def test_a_missing_pooled_vector_is_zeros(model: FluxTransformer) -> None:
    prompt = text(1)
    zeros = Conditioning(prompt.txt, torch.zeros_like(prompt.pooled), prompt.guidance)
    found = [
        model(TOKENS, model.prepare(p, [SIGMA], H, W), SIGMA) for p in (zeros, replace(prompt, pooled=None))
    ]
    assert torch.equal(*found)


def test_extra_channels_and_groups_reach_both_halves_of_guidance() -> None:
    model, x = flux_transformer(in_channels=128), drawn(2, 16, H, W)
    control = drawn(1, 16, H, W, seed=7)
    group = TokenGroup(drawn(1, 4, 128, seed=3), grid(4, 4, index=1.0))
    images = {"groups": (group,), "extra": control}

    def guided(batch: int, **images: Any) -> VelocityRequest:
        positive, negative = replace(text(1), **images), replace(text(2), **images)
        return VelocityRequest(positive, [SIGMA], H, W, batch, Guidance(negative, 3.0))

    rows = replace(group, tokens=drawn(2, 4, 128, seed=4))
    bias = drawn(2, 1, L + N + 4, L + N + 4, seed=5)
    of_rows = pack(guided_velocity(model, guided(2, extra=control, groups=(rows,), bias=bias))(x, SIGMA))
    for i in range(2):  # each row's own tokens and bias, in both halves
        one = (replace(rows, tokens=rows.tokens[i : i + 1]),)
        alone = guided(1, extra=control, groups=one, bias=bias[i : i + 1])
        assert (
            relative_error(of_rows[i : i + 1], pack(guided_velocity(model, alone)(x[i : i + 1], SIGMA)))
            < 1e-5
        )
    tokens = torch.cat([pack(x), pack(control).expand(2, -1, -1)], dim=-1)
    positive, negative = (
        model(tokens, model.prepare(replace(prompt, groups=(group,)), [SIGMA], H, W), SIGMA)
        for prompt in (text(1), text(2))
    )
    found = pack(guided_velocity(model, guided(2, **images))(x, SIGMA))
    assert relative_error(found, negative + 3.0 * (positive - negative)) < 1e-5
    with pytest.raises(ValueError, match="128 input channels, got 64"):
        guided_velocity(model, guided(2, groups=(group,)))


def test_positive_and_negative_may_have_images_of_their_own(model: FluxTransformer) -> None:
    """A reference on the prompt alone: two passes, each with its own tokens."""
    x, group = drawn(2, 16, H, W), TokenGroup(drawn(1, 4, SPEC.in_channels, seed=3), grid(4, 4, index=1.0))
    positive = replace(text(1), groups=(group,))
    request = VelocityRequest(positive, [SIGMA], H, W, 2, Guidance(text(2), 3.0))
    with_group, without = (
        model(pack(x), model.prepare(prompt, [SIGMA], H, W), SIGMA) for prompt in (positive, text(2))
    )
    found = pack(guided_velocity(model, request)(x, SIGMA))
    assert relative_error(found, without + 3.0 * (with_group - without)) < 1e-5


def test_strengths_scale_attention_to_references_and_text_spans(model: FluxTransformer) -> None:
    """Integer strengths equal as many copies; 0 leaves tokens out; 1 changes nothing."""
    group = TokenGroup(drawn(1, 4, SPEC.in_channels, seed=3), grid(4, 4, index=1.0))
    plain, without = velocity(model, groups=(group,)), velocity(model)
    assert torch.equal(velocity(model, groups=(replace(group, strength=1.0),)), plain)
    assert torch.equal(velocity(model, groups=(replace(group, strength=0.0),)), without)
    twice = velocity(model, groups=(replace(group, strength=2.0),))
    assert relative_error(velocity(model, groups=(group, group)), twice) < relative_error(plain, twice) / 2
    prompt = text(1)
    doubled = replace(prompt, txt=torch.cat([prompt.txt, prompt.txt[:, -2:]], dim=1))
    span = TextSpan(L - 2, L, 2.0)
    strong = model(TOKENS, model.prepare(replace(prompt, spans=(span,)), [SIGMA], H, W), SIGMA)
    copied = model(TOKENS, model.prepare(doubled, [SIGMA], H, W), SIGMA)
    assert relative_error(copied, strong) < relative_error(without, strong) / 2
    off = velocity(model, spans=(replace(span, strength=0.0),))
    cut = replace(prompt, txt=prompt.txt[:, : L - 2])
    assert relative_error(model(TOKENS, model.prepare(cut, [SIGMA], H, W), SIGMA), off) < 1e-5
    with pytest.raises(ValueError, match="0 or more, got -1"):
        velocity(model, groups=(replace(group, strength=-1.0),))


def test_a_bias_of_another_size_and_too_many_residuals_are_refused(model: FluxTransformer) -> None:
    with pytest.raises(ValueError, match=rf"{L + N}, {L + N}.* got \[1, 1, 3, 3\]"):
        velocity(model, bias=torch.zeros(1, 1, 3, 3))
    residuals = Residuals(double=[drawn(1, N, HIDDEN)] * (SPEC.depth + 1))
    with pytest.raises(ValueError, match=f"{SPEC.depth} double blocks, got {SPEC.depth + 1}"):
        velocity(model, Hooks(blocks=(residuals,)))


def test_a_tap_that_stops_records_every_evaluation(model: FluxTransformer) -> None:
    tap = Tap((PLACES[0], PLACES[-2]), stop=True)
    for seed in (1, 2):
        every = Tap(tuple(PLACES))
        prepared, tokens = model.prepare(text(seed), [SIGMA], H, W), drawn(2, N, SPEC.in_channels, seed=seed)
        for hook in (tap, every):
            model(tokens, prepared, SIGMA, Hooks(blocks=(hook,)))
        assert set(tap.states) == set(tap.places)
        assert all(torch.equal(state, every.states[place]) for place, state in tap.states.items())


def test_float16_clips_what_bfloat16_could_hold() -> None:
    """FLUX.1's residual streams exceed 65504: without the clipping the next norm makes NaN of inf."""
    model = flux_transformer().half()
    for block in (model.double_blocks[0].img_mlp[2], model.single_blocks[0].linear2):
        block.weight.mul_(3e4)
    prepared = model.prepare(text(1), [SIGMA], H, W)
    assert model(TOKENS.half(), prepared, SIGMA).isfinite().all()
