"""The autoencoder in strips against the autoencoder in one piece, on random weights."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, relative_error
from rectiflux.flux_core.memory import strips, tiling
from rectiflux.flux_core.memory.strips import Stored, Upsampled, convolved
from rectiflux.flux_core.model.autoencoder import AutoEncoder, Upsample
from torch import Tensor

SIZES = [(1, 5, 7), (2, 12, 9), (1, 1, 20), (3, 16, 2)]
"""Batch, height and width of latents; strips are of 4 rows, so there are up to 32 of them, some shorter."""


def double(seed: int = 1) -> AutoEncoder:
    return autoencoder(seed).double()


def latent(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 16, height, width, generator=generator, dtype=torch.float64)


def picture(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_strips_are_exact(batch: int, height: int, width: int, part: float) -> None:
    """In float64 to rounding: no halo is missing and no statistic is a strip's own.

    Whether there is room to keep activations (0.99), for some of them or for none (0) makes no difference.
    """
    model = double()
    raw = latent(batch, height, width)
    limit = int(part * tiling.bytes_in_one_piece(model, 8 * height, 8 * width))
    assert relative_error(tiling.decode(model, raw, limit=limit), model.decode(raw)) < 1e-13
    image = picture(batch, 16 * ((height + 1) // 2), 16 * ((width + 1) // 2))
    limit = int(part * tiling.bytes_in_one_piece(model, *image.shape[2:]))
    assert relative_error(tiling.encode(model, image, limit=limit), model.encode(image)) < 1e-13


def test_no_border_of_a_strip_can_be_seen() -> None:
    """In float32 the rows at borders of strips are as near to one piece as those in between."""
    model = autoencoder()
    raw = latent(1, 24, 6).float()
    need = tiling.bytes_in_one_piece(model, 192, 48)
    told: list[int] = []
    tiled = tiling.decode(model, raw, lambda done, total: told.append(done), limit=need // 3)
    assert len(told) > 192 // 4, "it was in strips of 4 rows"
    errors = (tiled - model.decode(raw)).abs().amax(dim=(0, 1, 3)) / tiled.abs().max()
    assert errors.max() < 1e-5
    borders = torch.tensor([row % 4 in (0, 3) for row in range(192)])
    assert errors[borders].mean() < 2 * errors[~borders].mean()


def test_what_is_kept_in_16_bits_is_far_below_a_level() -> None:
    """Without any room all activations are; a level of 8 bits is 1 / 127.5 of the largest value."""
    model = autoencoder()
    raw, image = latent(1, 16, 16).float(), picture(1, 128, 128).float()
    assert relative_error(tiling.decode(model, raw, limit=0), model.decode(raw)) < 0.05 / 127.5
    assert relative_error(tiling.encode(model, image, limit=0), model.encode(image)) < 2e-4
    need = tiling.bytes_in_one_piece(model, 128, 128)
    assert relative_error(tiling.decode(model, raw, limit=need - 1), model.decode(raw)) < 1e-5


def test_bf16_strips_are_as_near_to_float32_as_bf16_in_one_piece() -> None:
    model = autoencoder()
    raw = latent(1, 16, 16).float()
    exact = model.decode(raw)
    model.bfloat16()
    whole = (model.decode(raw).float() - exact).square().mean()
    tiled = tiling.decode(model, raw, limit=0)
    assert tiled.dtype == torch.bfloat16
    assert (tiled.float() - exact).square().mean() < 1.2 * whole


def test_a_picture_that_fits_is_taken_in_one_piece() -> None:
    model = autoencoder()
    raw, image = latent(2, 4, 6).float(), picture(2, 32, 48).float()
    need = tiling.bytes_in_one_piece(model, 32, 48)
    told: list[tuple[int, int]] = []
    both = tiling.decode(model, raw, lambda *step: told.append(step), limit=2 * need)
    assert torch.equal(both, model.decode(raw)) and not told
    assert torch.equal(tiling.encode(model, image, limit=2 * need), model.encode(image))


def test_pictures_of_which_one_fits_are_taken_one_by_one() -> None:
    model = autoencoder()
    raw, image = latent(2, 4, 6).float(), picture(2, 32, 48).float()
    need = tiling.bytes_in_one_piece(model, 32, 48)
    told: list[float] = []
    tiled = tiling.decode(model, raw, lambda done, total: told.append(done / total), limit=need)
    assert torch.equal(tiled, torch.cat([model.decode(one) for one in raw.split(1)]))
    assert told == [0.5, 1.0]
    told.clear()
    tiled = tiling.encode(model, image, lambda done, total: told.append(done / total), limit=need)
    assert torch.equal(tiled, torch.cat([model.encode(one) for one in image.split(1)]))
    assert told == [0.5, 1.0]


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_progress_rises_to_all_of_it_and_can_end_the_work(what: str) -> None:
    model = autoencoder()
    run = getattr(tiling, what)
    given = latent(2, 8, 8).float() if what == "decode" else picture(2, 64, 64).float()
    told: list[tuple[int, int]] = []
    run(model, given, lambda *step: told.append(step), limit=0)
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0] and list(done) == sorted(done)

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model, given, stop, limit=0)


def test_what_was_given_stays_as_it_was() -> None:
    model = autoencoder()
    raw, image = latent(1, 8, 8).float(), picture(1, 64, 64).float()
    image = image.contiguous(memory_format=torch.channels_last)
    before = raw.clone(), image.clone()
    tiling.decode(model, raw, limit=0)
    tiling.encode(model, image, limit=0)
    assert torch.equal(raw, before[0]) and torch.equal(image, before[1])


def test_a_full_size_picture_has_room_on_a_machine_with_two_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU strips begin at LIMIT, or where less is free; on a graphics card only where less is free."""
    monkeypatch.setattr(tiling, "free_memory", lambda device: 10**10)
    assert tiling.room(torch.device("cpu")) == tiling.LIMIT < 2 * 10**9
    assert tiling.room(torch.device("cuda")) == 9 * 10**9
    monkeypatch.setattr(tiling, "free_memory", lambda device: 10**9)
    assert tiling.room(torch.device("cpu")) == tiling.room(torch.device("cuda")) == 9 * 10**8
    monkeypatch.setattr(tiling, "free_memory", lambda device: None)
    assert tiling.room(torch.device("cpu")) == tiling.room(torch.device("mps")) == tiling.LIMIT


def test_wrong_shapes_are_refused_as_in_one_piece() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match="decodes latents of 16 channels, got 4; wire in a FLUX.1 latent"):
        tiling.decode(model, torch.zeros(1, 4, 4, 4), limit=0)
    with pytest.raises(ValueError, match="sides must be multiples of 16 to be encoded, got 40x32"):
        tiling.encode(model, torch.zeros(1, 3, 32, 40), limit=0)


def test_a_damaged_weight_is_not_hidden_by_16_bits() -> None:
    """Values that are no numbers come out as such."""
    stored = Stored((2, 4, 3), torch.zeros(1), compact=True)
    rows = torch.ones(1, 2, 4, 3)
    rows[0, 0, 1, 1], rows[0, 1, 2, 2] = float("nan"), float("inf")
    stored.fill(0, rows)
    finite = torch.isfinite(stored.whole()).all(dim=3)[0]
    assert finite.tolist() == [[True, False, True, True], [True, True, False, True]]


def test_what_was_made_compact_holds_no_more_than_it_says() -> None:
    """A view of the float32 that it was, however empty, would keep all of that in memory."""
    stored = Stored((3, 12, 5), torch.zeros(1))
    stored.fill(0, torch.ones(1, 3, 12, 5))
    stored.compact()
    tensors = [value for value in vars(stored).values() if isinstance(value, Tensor)]
    memory = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    assert stored.nbytes == 3 * 12 * 5 * 2
    assert sum(memory.values()) == stored.nbytes + 3 * 12 * 4  # a scale for each row of each channel


@pytest.mark.parametrize("compact", [False, True])
def test_rows_can_be_read_as_they_were_while_they_are_overwritten(compact: bool) -> None:
    stored = Stored((3, 12, 5), torch.zeros(1), compact)
    old = picture(1, 12, 5).float()
    stored.fill(0, old)
    kept = stored.whole().clone()
    assert relative_error(kept, old) <= (2**-16 * 1.01 if compact else 0)
    for first in range(0, 12, 4):
        above, below = max(first - strips.HALO, 0), min(first + 6, 12)
        assert torch.equal(stored.rows(above, below), kept[:, :, above:below])
        stored.overwrite(first, -old[:, :, first : first + 4])
    assert relative_error(stored.whole(), -kept) <= (2**-15 if compact else 0)
    assert stored.nbytes == 3 * 12 * 5 * (2 if compact else 4)


def test_rows_of_an_upsampled_activation() -> None:
    """Any rows, from an odd one or to an odd one too, are those of the whole."""
    layer = Upsample(4).double().requires_grad_(False)
    x = latent(1, 5, 3)[:, :4]
    whole = layer(x)
    upsampled = Upsampled(Stored.of(x), layer)
    assert upsampled.shape == whole.shape[1:]
    for first, last in [(0, 10), (0, 3), (3, 7), (4, 10), (9, 10)]:
        torch.testing.assert_close(
            upsampled.rows(first, last), whole[:, :, first:last], rtol=1e-13, atol=1e-13
        )
    rows = convolved(layer.conv, lambda a, b: x[:, :, a:b], 5, 1, 5)
    torch.testing.assert_close(rows, layer.conv(x)[:, :, 1:5], rtol=1e-13, atol=1e-13)
