"""The autoencoder in strips against the autoencoder in one piece, on random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, relative_error
from rectiflux.flux_core.memory import tiling
from rectiflux.flux_core.memory.strips import HALO, RowBuffer, UpsampledRows, convolve_rows
from rectiflux.flux_core.model.autoencoder import AutoEncoder, Upsample
from torch import Tensor

SIZES = [(1, 5, 7), (2, 12, 9), (1, 1, 20), (3, 16, 2)]
"""Batch, height and width of latents; strips have 4 rows, so there are up to 32 of them, some shorter."""
Run = Callable[[AutoEncoder, Tensor], Tensor]
BOTH = pytest.mark.parametrize("run", [tiling.decode, tiling.encode])


def latent(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 16, height, width, generator=generator, dtype=torch.float64)


def image(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def given(run: Run, batch: int, side: int) -> tuple[Tensor, Run]:
    """An input of square images for a tiled run, float32, and the run in one piece."""
    if run is tiling.decode:
        return latent(batch, side // 8, side // 8).float(), AutoEncoder.decode
    return image(batch, side, side).float(), AutoEncoder.encode


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_strips_are_exact(batch: int, height: int, width: int, share: float) -> None:
    """In float64 up to rounding, whether activations are stored (0.99), some (0.4) or none (0).

    No halo is missing, and no statistic is that of a strip alone.
    """
    model = autoencoder(1).double()
    raw = latent(batch, height, width)
    limit = int(share * tiling.activation_bytes(model, 8 * height, 8 * width))
    assert relative_error(tiling.decode(model, raw, limit=limit), model.decode(raw)) < 1e-13
    images = image(batch, 8 * height, 8 * width)
    limit = int(share * tiling.activation_bytes(model, *images.shape[2:]))
    assert relative_error(tiling.encode(model, images, limit=limit), model.encode(images)) < 1e-13


def test_no_border_of_a_strip_is_visible() -> None:
    """In float32 the rows at borders of strips are as close to one piece as the others."""
    model = autoencoder()
    raw = latent(1, 24, 6).float()
    limit = tiling.activation_bytes(model, 192, 48) // 3
    errors = (tiling.decode(model, raw, limit=limit) - model.decode(raw)).abs().amax(dim=(0, 1, 3))
    errors /= model.decode(raw).abs().max()
    assert errors.max() < 1e-5
    borders = torch.tensor([row % 4 in (0, 3) for row in range(192)])
    assert errors[borders].mean() < 2 * errors[~borders].mean()


def test_16_bit_storage_is_far_more_accurate_than_8_bit_images() -> None:
    """With limit 0 all activations have it; an 8-bit level is 1 / 127.5 of the largest value."""
    model = autoencoder()
    raw, images = latent(1, 16, 16).float(), image(1, 128, 128).float()
    assert relative_error(tiling.decode(model, raw, limit=0), model.decode(raw)) < 0.05 / 127.5
    assert relative_error(tiling.encode(model, images, limit=0), model.encode(images)) < 2e-4
    limit = tiling.activation_bytes(model, 128, 128) - 1
    assert relative_error(tiling.decode(model, raw, limit=limit), model.decode(raw)) < 1e-5


def test_bf16_in_strips_is_as_accurate_as_in_one_piece() -> None:
    model = autoencoder()
    raw = latent(1, 16, 16).float()
    exact = model.decode(raw)
    model.bfloat16()
    whole = (model.decode(raw).float() - exact).square().mean()
    tiled = tiling.decode(model, raw, limit=0)
    assert tiled.dtype == torch.bfloat16
    assert (tiled.float() - exact).square().mean() < 1.2 * whole


@BOTH
def test_a_batch_that_fits_is_one_piece_and_one_that_does_not_goes_image_by_image(run: Run) -> None:
    model = autoencoder()
    need = tiling.activation_bytes(model, 48, 48)
    batch, in_one_piece = given(run, 2, 48)
    progress: list[float] = []
    result = run(model, batch, lambda done, total: progress.append(done / total), limit=2 * need)
    assert torch.equal(result, in_one_piece(model, batch)) and not progress
    result = run(model, batch, lambda done, total: progress.append(done / total), limit=need)
    assert torch.equal(result, torch.cat([in_one_piece(model, single) for single in batch.split(1)]))
    assert progress == [0.5, 1.0]


@BOTH
def test_progress_ends_at_its_total_and_can_stop_the_work(run: Run) -> None:
    model = autoencoder()
    batch, _ = given(run, 2, 64)
    before = batch.clone()
    progress: list[tuple[int, int]] = []
    run(model, batch, lambda *step: progress.append(step), limit=0)
    assert torch.equal(batch, before), "inputs are not overwritten"
    done, totals = zip(*progress, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0] and list(done) == sorted(done)

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model, batch, stop, limit=0)


def test_a_channels_last_image_is_not_overwritten() -> None:
    images = image(1, 64, 64).float().contiguous(memory_format=torch.channels_last)
    before = images.clone()
    tiling.encode(autoencoder(), images, limit=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("free", "cpu", "cuda"),
    [(10**10, tiling.CPU_LIMIT, 9 * 10**9), (10**9, 9 * 10**8, 9 * 10**8), (None, tiling.CPU_LIMIT, None)],
)
def test_limits_by_device(
    free: int | None, cpu: int, cuda: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU uses strips from CPU_LIMIT on, or where less is free; a GPU only where less is free."""
    monkeypatch.setattr(tiling, "free_memory", lambda device: free)
    assert tiling.activation_limit(torch.device("cpu")) == cpu < 2 * 10**9
    if cuda is not None:
        assert tiling.activation_limit(torch.device("cuda")) == cuda


def test_wrong_shapes_are_refused_as_in_one_piece() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match="16 channels, got 4"):
        tiling.decode(model, torch.zeros(1, 4, 4, 4), limit=0)
    with pytest.raises(ValueError, match="36x32"):
        tiling.encode(model, torch.zeros(1, 3, 32, 36), limit=0)


def test_nan_and_inf_are_not_hidden_by_16_bits() -> None:
    buffer = RowBuffer((2, 4, 3), torch.zeros(1), compact=True)
    rows = torch.ones(1, 2, 4, 3)
    rows[0, 0, 1, 1], rows[0, 1, 2, 2] = float("nan"), float("inf")
    buffer.fill(0, rows)
    finite = torch.isfinite(buffer.whole()).all(dim=3)[0]
    assert finite.tolist() == [[True, False, True, True], [True, True, False, True]]


def test_a_buffer_made_compact_releases_its_float32_memory() -> None:
    """A view of the former memory, however empty, would keep all of it."""
    buffer = RowBuffer((3, 12, 5), torch.zeros(1))
    buffer.fill(0, torch.ones(1, 3, 12, 5))
    buffer.compact()
    tensors = [value for value in vars(buffer).values() if isinstance(value, Tensor)]
    memory = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    assert buffer.nbytes == 3 * 12 * 5 * 2
    assert sum(memory.values()) == buffer.nbytes + 3 * 12 * 4  # a scale for each row of each channel


@pytest.mark.parametrize("compact", [False, True])
def test_old_rows_can_be_read_while_they_are_overwritten(compact: bool) -> None:
    buffer = RowBuffer((3, 12, 5), torch.zeros(1), compact)
    old = image(1, 12, 5).float()
    buffer.fill(0, old)
    stored = buffer.whole().clone()
    assert relative_error(stored, old) <= (2**-16 * 1.01 if compact else 0)
    for first in range(0, 12, 4):
        above, below = max(first - HALO, 0), min(first + 6, 12)
        assert torch.equal(buffer.rows(above, below), stored[:, :, above:below])
        buffer.overwrite(first, -old[:, :, first : first + 4])
    assert relative_error(buffer.whole(), -stored) <= (2**-15 if compact else 0)
    assert buffer.nbytes == 3 * 12 * 5 * (2 if compact else 4)


def test_rows_of_an_upsampled_activation() -> None:
    """Any rows, also from or to an odd one, equal those of the whole."""
    layer = Upsample(4).double().requires_grad_(False)
    x = latent(1, 5, 3)[:, :4]
    whole = layer(x)
    upsampled = UpsampledRows(RowBuffer.of(x), layer)
    assert upsampled.shape == whole.shape[1:]
    for first, last in [(0, 10), (0, 3), (3, 7), (4, 10), (9, 10)]:
        torch.testing.assert_close(
            upsampled.rows(first, last), whole[:, :, first:last], rtol=1e-13, atol=1e-13
        )
    rows = convolve_rows(layer.conv, lambda a, b: x[:, :, a:b], 5, 1, 5)
    torch.testing.assert_close(rows, layer.conv(x)[:, :, 1:5], rtol=1e-13, atol=1e-13)
