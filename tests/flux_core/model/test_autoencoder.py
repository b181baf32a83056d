"""The autoencoder against diffusers' AutoencoderKL on the same weights, in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import (
    AE_SPEC,
    autoencoder,
    diffusers_autoencoder,
    randomize,
    relative_error,
)
from rectiflux.flux_core.memory.tiling import activation_bytes
from rectiflux.flux_core.memory.tiling import decode as decode_in_strips
from rectiflux.flux_core.model.autoencoder import (
    AutoEncoder,
    AutoEncoderSpec,
    Upsample,
    channels_last,
    to_model_space,
    to_vae_space,
)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 16, 48), (1, 64, 16)])
def test_agrees_with_diffusers(batch: int, height: int, width: int) -> None:
    ours = autoencoder()
    theirs = diffusers_autoencoder(ours)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    distribution = theirs.encode(image).latent_dist
    mean, log_variance = ours.posterior(image)
    assert mean.shape == (batch, 16, height // 8, width // 8)
    assert relative_error(mean, distribution.mean) < 1e-5
    assert relative_error(log_variance.clamp(-30, 20), distribution.logvar) < 1e-5
    assert torch.equal(ours.encode(image), mean)
    latent = torch.randn(mean.shape, generator=generator)
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (4, 2)])
def test_upsampling_is_a_convolution_of_nearest_neighbors(height: int, width: int) -> None:
    """The four 2x2 kernels agree with the 3x3 kernel on the enlarged input, and in their gradients."""
    layer = Upsample(6).double()
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    expected = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    result = layer(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.randn_like(expected)
    inputs = (x, layer.conv.weight, layer.conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(result, inputs, wanted),
        torch.autograd.grad(expected, inputs, wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_channels_last_weights_give_the_same_values() -> None:
    """And are not converted again: the upsampling's kernels are channels last as well."""
    plain, converted = autoencoder(), autoencoder()
    channels_last(converted)
    latent = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    assert relative_error(converted.decode(latent), plain.decode(latent)) < 1e-6
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    assert relative_error(converted.encode(image), plain.encode(image)) < 1e-6
    last = torch.channels_last
    for module in converted.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=last)
        if isinstance(module, Upsample):
            assert all(kernel.is_contiguous(memory_format=last) for kernel in module.kernels().values())


@pytest.mark.slow
def test_an_image_of_1024_pixels_is_exact() -> None:
    """Against float64, in one piece and in strips; torch's own channels-last GroupNorm is off by 4e-4."""
    model = AutoEncoder(AutoEncoderSpec(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1)).requires_grad_(False)
    randomize(model, 1)
    latent = torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(0))
    in_one_piece = model.decode(latent)
    in_strips = decode_in_strips(model, latent, limit=activation_bytes(model, 1024, 1024) - 1)
    expected = model.double().decode(latent)
    assert relative_error(in_one_piece, expected) < 1e-5
    assert relative_error(in_strips, expected) < 1e-5


def test_full_size_is_flux() -> None:
    """As in Black Forest Labs' ae.safetensors, and recovered from the shapes."""
    with torch.device("meta"):
        state_dict = AutoEncoder(AutoEncoderSpec()).state_dict()
    assert len(state_dict) == 244
    assert sum(tensor.numel() for tensor in state_dict.values()) == 83_819_683
    assert AutoEncoderSpec.from_state_dict(state_dict) == AutoEncoderSpec()
    assert AutoEncoderSpec().groups == 32


def test_sizes_come_from_the_state_dict() -> None:
    assert AutoEncoderSpec.from_state_dict(autoencoder().state_dict()) == AE_SPEC
    with pytest.raises(ValueError, match="encoder.conv_in.weight is missing"):
        AutoEncoderSpec.from_state_dict({"img_in.weight": torch.zeros(1)})


def test_scales_are_flux() -> None:
    """black-forest-labs/flux, src/flux/util.py: scale_factor 0.3611, shift_factor 0.1159."""
    assert to_model_space(torch.tensor(1.1159)).item() == pytest.approx(0.3611)
    latent = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(to_vae_space(to_model_space(latent)), latent, rtol=1e-14, atol=1e-14)


def test_wrong_shapes_are_refused() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match="multiples of 8 .* got 36x32"):
        model.encode(torch.zeros(1, 3, 32, 36))
    with pytest.raises(ValueError, match="3 channels .* got 4"):
        model.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="16 channels, got 4"):
        model.decode(torch.zeros(1, 4, 4, 4))
