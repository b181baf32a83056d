"""The training set: encoded scenes, token labels, and latents of the scenes beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import read_state_dict
from rectiflux.flux_core.model.autoencoder import AutoEncoder, to_model_space
from rectiflux.miniature import data
from rectiflux.miniature.autoencoder import from_uint8
from rectiflux.miniature.draw import draw
from rectiflux.miniature.pca import encode_linear, linear_code
from rectiflux.miniature.scene import COLORS, SHAPES, PlacedItem, random_scene

SIZES = ((64, 32, 0.5), (32, 64, 0.5))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, new_autoencoder: Callable[[], AutoEncoder]) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    data.write_latents(path, new_autoencoder(), 40, seed=3, workers=1, sizes=SIZES)
    return path


def test_encoded_scenes_are_decoded() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(500)]
    assert {scene.kind for scene in scenes} == {"single", "pair", "count"}
    assert [data.decode_scene(data.encode_scene(scene)) for scene in scenes] == scenes


def test_token_labels_of_a_square_amid_four_tokens() -> None:
    """Half sides of 14 about (32, 16) of a 64 x 32 image: in tokens 1 and 2 of each row.

    Pillow's polygons cover every pixel that their edge touches, here an eighth of a cell more at each side.
    """
    labels = data.token_labels([PlacedItem("square", "blue", 32, 16, 14 / 0.84)], 64, 32)
    assert labels.shape == (8, 18)
    codes = [1 + SHAPES.index("square"), 1 + list(COLORS).index("blue")]
    for token, row in enumerate(labels):
        inside = token % 4 in (1, 2)
        assert row[:2].tolist() == (codes if inside else [0, 0])
        assert inside == bool(row[2:].any())
    pixels = labels[:, 2:].sum() / 255 * (data.TOKEN / data.CELLS) ** 2
    assert pixels == pytest.approx(29**2, rel=0.01)


def test_latents_are_of_their_scenes(latents: Path, new_autoencoder: Callable[[], AutoEncoder]) -> None:
    """The first one drawn and encoded again, from its seed."""
    tensors = read_state_dict(latents)
    assert (
        tensors["64x32/latents"].shape == (20, 16, 4, 8) and tensors["64x32/latents"].dtype == torch.float16
    )
    assert tensors["32x64/tokens"].shape == (20, 8, 18)
    rng = random.Random(3 * 1_000_003)
    scene = random_scene(rng)
    assert data.decode_scene(tensors["64x32/scenes"][0].tolist()) == scene
    image = from_uint8(draw(scene, rng, 64, 32)[None])
    expected = to_model_space(encode_linear(image, linear_code(new_autoencoder())))[0]
    assert (tensors["64x32/latents"][0].float() - expected).abs().max() < 5e-3


def test_workers_do_not_change_the_latents(
    latents: Path, tmp_path: Path, new_autoencoder: Callable[[], AutoEncoder]
) -> None:
    path = tmp_path / "again.safetensors"
    data.write_latents(path, new_autoencoder(), 40, seed=3, workers=2, sizes=SIZES)
    before, after = read_state_dict(latents), read_state_dict(path)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_captions_fit_their_latents_and_some_are_empty(latents: Path) -> None:
    """A caption that names a background's own word names that of its scene; sizes never mix in a batch."""
    found = data.LatentSet(latents)
    rng = random.Random(0)
    empty, sizes = 0, set()
    for _ in range(60):
        images, captions, labels = found.batch(8, rng, empty_share=0.25)
        sizes.add(tuple(images.shape[1:]))
        empty += sum(not caption for caption in captions)
        part = next(p for p in found.parts if p["latents"].shape[1:] == images.shape[1:])
        for image, caption, label in zip(images, captions, labels, strict=True):
            row = int((part["latents"].float() - image).abs().sum(dim=(1, 2, 3)).argmin())
            assert torch.equal(label, part["tokens"][row])
            background = data.decode_scene(part["scenes"][row].tolist()).background
            named = [word for word in ("mint", "lavender", "beige") if word in caption.lower()]
            assert not named or named == [background]
    assert sizes == {(16, 4, 8), (16, 8, 4)}
    assert empty / 480 == pytest.approx(0.25, abs=0.06)


def test_another_file_is_no_file_of_latents(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=r"x\.safetensors holds no latents"):
        data.LatentSet(tmp_path / "x.safetensors")
