"""The transformer against diffusers on the same weights, in float32, and its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference.models import (
    SPEC,
    diffusers_transformer,
    diffusers_velocity,
    flux_transformer,
    relative_error,
)
from rectiflux.flux_core.model.layers import RMSNorm
from rectiflux.flux_core.model.ops import apply_rope, rope_table
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, Conditioning, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer, pack, position_ids, unpack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def inputs(spec: FluxSpec, batch: int, h: int, w: int, length: int) -> tuple[torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(batch, h * w // 4, spec.in_channels, generator=generator)
    txt = torch.randn(batch, length, spec.context_in, generator=generator)
    pooled = torch.randn(batch, spec.vec_in, generator=generator)
    return tokens, Conditioning(txt, pooled, guidance=3.5 if spec.guidance_embed else None)


class Bare(TorchDispatchMode):
    """A device, for which "meta" stands in, that has neither float64 nor complex numbers: Apple's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.device.type == "meta":
                assert t.dtype != torch.float64 and not t.dtype.is_complex, f"{func} makes {t.dtype}"
        return found


def test_a_device_needs_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flux_transformer().to("meta")
    tokens, conditioning = inputs(SPEC, 2, 6, 4, 5)
    with torch.no_grad(), Bare():
        prepared = model.prepare(conditioning, [1.0, 0.5], 6, 4)
        velocity = model(tokens.to("meta"), prepared, 0.5)
        with pytest.raises(AssertionError, match="makes torch.float64"):
            velocity.double()
    assert velocity.shape == tokens.shape and velocity.device.type == "meta"


def test_a_norm_goes_to_where_its_input_is() -> None:
    """ComfyUI leaves the smallest weights behind where there is no room for all."""
    norm, x = RMSNorm(8), torch.randn(2, 3, 8).to("meta", torch.bfloat16)
    y = norm(x)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, x.shape)
    assert norm.scale.device.type == "cpu"


@pytest.mark.parametrize(
    ("sizes", "batch", "h", "w", "length", "sigma"),
    [
        pytest.param({}, 1, 8, 8, 7, 0.75, id="square"),
        pytest.param({}, 2, 6, 10, 5, 0.31, id="batch of two, not square"),
        pytest.param({"guidance_embed": False}, 1, 8, 4, 12, 1.0, id="no guidance embedder"),
        pytest.param({"guidance_embed": False}, 3, 2, 2, 1, 0.0, id="one token each, sigma 0"),
        pytest.param({"depth": 1, "depth_single": 1}, 1, 4, 6, 9, 0.5, id="one block each"),
        pytest.param({"depth": 4, "depth_single": 2}, 1, 4, 4, 33, 0.9, id="more double than single"),
        pytest.param({"num_heads": 1}, 1, 4, 4, 3, 0.1, id="head dim 64"),
        pytest.param({"in_channels": 96}, 1, 4, 4, 3, 0.6, id="extra input channels"),
        pytest.param(
            {"hidden_size": 256, "depth": 1, "depth_single": 1}, 1, 12, 20, 16, 0.42, id="head dim 128"
        ),
    ],
)
def test_agrees_with_diffusers(sizes: dict, batch: int, h: int, w: int, length: int, sigma: float) -> None:
    model = flux_transformer(**sizes)
    tokens, text = inputs(model.spec, batch, h, w, length)
    ours = model(tokens, model.prepare(text, [1.0, sigma], h, w), sigma)
    theirs = diffusers_velocity(diffusers_transformer(model), tokens, text, sigma, h, w)
    assert ours.shape == tokens.shape[:2] + (model.spec.out_channels,)
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("spec", "parameters", "tensors"),
    [
        (FLUX_DEV, 11_901_408_320, 780),
        (FLUX_SCHNELL, 11_891_178_560, 776),
    ],
)
def test_full_size_is_flux(spec: FluxSpec, parameters: int, tensors: int) -> None:
    """Counted in the checkpoints that Black Forest Labs publish."""
    with torch.device("meta"):
        state_dict = FluxTransformer(spec).state_dict()
    assert (sum(tensor.numel() for tensor in state_dict.values()), len(state_dict)) == (parameters, tensors)
    assert spec.axes_dim == (16, 56, 56)
    assert FluxSpec.from_state_dict(state_dict) == spec


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"guidance_embed": False, "depth": 5, "depth_single": 1},
        {
            "hidden_size": 96,
            "num_heads": 3,
            "mlp_ratio": 2.5,
            "in_channels": 384,
            "context_in": 8,
            "vec_in": 12,
        },
    ],
)
def test_sizes_are_read_off_the_state_dict(sizes: dict) -> None:
    model = flux_transformer(**sizes)
    assert FluxSpec.from_state_dict(model.state_dict()) == model.spec


def test_state_dict_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has img_in.weight, which is missing"):
        FluxSpec.from_state_dict({"conv_in.weight": torch.zeros(1)})


@pytest.mark.parametrize(("hidden", "heads"), [(64, 3), (64, 4), (64, 0), (96, 2)])
def test_heads_that_cannot_be_turned_are_refused(hidden: int, heads: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32 dims for the three rotary axes, got"):
        FluxSpec(hidden, heads, 1, 1, context_in=4, vec_in=4)


def test_pack_orders_a_token_as_channel_row_column() -> None:
    """Worked by hand: token 1 of a 2 x 4 latent with two channels is its right half."""
    latent = torch.arange(16.0).reshape(1, 2, 2, 4)
    assert pack(latent)[0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


def test_unpack_undoes_pack() -> None:
    latent = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack(pack(latent), 6, 10), latent)


def test_odd_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="latent height and width must be even to pack 2x2, got 65x64"):
        pack(torch.zeros(1, 16, 65, 64))


def test_position_ids() -> None:
    assert position_ids(2, 4, 6).tolist() == [[0, 0, 0]] * 2 + [[0, r, c] for r in range(2) for c in range(3)]


def test_every_prepared_sigma_gives_what_it_gives_alone() -> None:
    model = flux_transformer()
    tokens, text = inputs(SPEC, 2, 4, 4, 3)
    sigmas = [1.0, 0.7, 0.35, 0.35, 0.0]
    together = model.prepare(text, sigmas, 4, 4)
    for sigma in sigmas:
        alone = model.prepare(text, [sigma], 4, 4)
        assert relative_error(model(tokens, together, sigma), model(tokens, alone, sigma)) < 2e-6


def test_modulations_of_one_batch_equal_those_of_each_sigma() -> None:
    model = flux_transformer()
    _, prompt = inputs(SPEC, 2, 4, 4, 3)
    sigma, guidance = torch.full((2,), 0.7), torch.full((2,), 3.5)
    alone = model.modulate(model.embed_time(sigma, guidance, prompt.pooled)).chunks()
    made = model.prepare(prompt, [1.0, 0.7, 0.2], 4, 4).at(0.7)
    for chunk, expected in zip(made.chunks(), alone, strict=True):
        torch.testing.assert_close(chunk, expected, rtol=1e-5, atol=1e-6)
    assert [c.shape for c in made.double[0][1]] == [(2, 1, SPEC.hidden_size)] * 6
    torch.testing.assert_close(made.single[2][1], alone[2 * 12 + 2 * 3 + 1], rtol=1e-5, atol=1e-6)


def test_one_conditioning_serves_a_batch() -> None:
    model = flux_transformer()
    tokens, text = inputs(SPEC, 3, 4, 4, 3)
    one = Conditioning(text.txt[:1], text.pooled[:1], 3.5)
    three = Conditioning(one.txt.repeat(3, 1, 1), one.pooled.repeat(3, 1), 3.5)
    shared = model(tokens, model.prepare(one, [0.5], 4, 4), 0.5)
    assert relative_error(shared, model(tokens, model.prepare(three, [0.5], 4, 4), 0.5)) < 2e-6


def test_a_quarter_of_flux_dev_only_makes_modulations() -> None:
    """3.246 billion of 11.901: 6 hidden^2 in each of 38 stream modulations, 3 in 38 more, 2 in the last."""
    with torch.device("meta"):
        model = FluxTransformer(FLUX_DEV)
    made_by = ("_mod.lin.weight", "modulation.lin.weight", "adaLN_modulation.1.weight")
    count = sum(p.numel() for name, p in model.named_parameters() if name.endswith(made_by))
    assert count == (38 * 6 + 38 * 3 + 2) * 3072**2 == 3_246_391_296


def test_bfloat16_stays_near_float32() -> None:
    model = flux_transformer()
    tokens, text = inputs(SPEC, 1, 4, 4, 3)
    exact = model(tokens, model.prepare(text, [0.5], 4, 4), 0.5)
    model.to(torch.bfloat16)
    rough = model(tokens, model.prepare(text, [0.5], 4, 4), 0.5)
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough.float(), exact) < 0.05


def test_errors_are_told_before_the_blocks_run() -> None:
    model = flux_transformer()
    tokens, text = inputs(SPEC, 1, 4, 4, 3)
    with pytest.raises(ValueError, match="sigma 0.25 was not prepared"):
        model(tokens, model.prepare(text, [0.5], 4, 4), 0.25)
    with pytest.raises(ValueError, match="takes a distilled guidance scale, got none; set guidance"):
        model.prepare(Conditioning(text.txt, text.pooled), [0.5], 4, 4)
    with pytest.raises(ValueError, match="reads text of width 24, got 8; choose the text encoders"):
        model.prepare(Conditioning(text.txt[..., :8], text.pooled, 1.0), [0.5], 4, 4)
    with pytest.raises(
        ValueError, match="reads a pooled vector of width 20, got 4; choose the text encoders"
    ):
        model.prepare(Conditioning(text.txt, text.pooled[:, :4], 1.0), [0.5], 4, 4)


def test_a_frozen_network_hands_gradients_to_its_image() -> None:
    """The same as those of one that is being trained, though its text has none."""
    model = flux_transformer(guidance_embed=False)
    tokens, text = inputs(model.spec, 2, 4, 6, 5)
    gradients = []
    for training in (False, True):
        model.requires_grad_(training)
        image = tokens.clone().requires_grad_()
        model(image, model.prepare(text, [0.7], 4, 6), 0.7).square().sum().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_rotate_are_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complex product, and the real one that a compiler gets; in float32 the gradients too."""
    rope = rope_table(position_ids(3, 6, 8), (4, 14, 14), 10_000)
    x = torch.randn(2, 3, 15, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    complex_ = apply_rope(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    real = apply_rope(x, rope)
    assert complex_.dtype == dtype
    torch.testing.assert_close(complex_, real, rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:
        weight = torch.linspace(-1, 1, x.numel()).view_as(x)
        ours, theirs = (torch.autograd.grad(y, x, weight)[0] for y in (complex_, real))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    """Su et al. 2021: q at row r and k at row s have a product that depends on r - s alone."""
    rope = rope_table(position_ids(0, 16, 2), (4, 14, 14), 10_000)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(1)).expand(2, 1, 1, 8, 32)
    q_turned, k_turned = apply_rope(q, rope), apply_rope(k, rope)
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    products = (q_turned @ k_turned.mT)[0, 0]
    for distance in range(-7, 8):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
