"""The case png: both sides paint the same picture, from the miniature and from random models; no time."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import rectiflux
import torch
from PIL import Image
from rectiflux.benchmarks import speed_png
from rectiflux.benchmarks.interleaved import Clock, Ratio
from rectiflux.benchmarks.speed_png import Sizes, png
from rectiflux.benchmarks.speed_settings import Outcome, Settings, Skipped, Told
from rectiflux.flux_core.model.autoencoder import AutoEncoderSpec
from rectiflux.flux_core.model.spec import FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer

MODELS = Path(rectiflux.__file__).parent / "models"
TINY = Sizes(
    FluxSpec(64, 1, 1, 1, context_in=64, vec_in=64),
    AutoEncoderSpec(ch=32),
    t5=(1, 64, 64, 1),
    clip=(1, 64, 64, 1),
    txt_length=8,
    side=32,
)


def settings_of(folder: Path) -> Settings:
    return Settings(True, 0.0, Clock(), folder)


def difference(outcomes: list[Outcome]) -> int:
    (told,) = (one.line for one in outcomes if isinstance(one, Told))
    found = re.fullmatch(r"png: largest difference (\d+) of 255", told)
    assert found is not None
    return int(found[1])


def test_the_miniature_paints_as_diffusers_does() -> None:
    outcomes = list(png(settings_of(MODELS)))
    (ratio,) = (one for one in outcomes if isinstance(one, Ratio))
    assert ratio.case == "png-128" and ratio.note == "mini-schnell, 4 steps" and ratio.turns == 2
    assert difference(outcomes) <= 1


def test_random_models_of_given_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where both sides round elsewhere; a machine that cannot compile says so."""

    def refuse(model: FluxTransformer) -> tuple[FluxTransformer, str]:
        return model, "compiling needs g++"

    monkeypatch.setattr(speed_png, "compiled_or_not", refuse)
    outcomes = list(png(settings_of(MODELS), TINY))
    (ratio,) = (one for one in outcomes if isinstance(one, Ratio))
    assert ratio.case == "png-32"
    assert ratio.note == "[schnell] in bf16, ours eager, compiling needs g++, 4 steps"
    assert difference(outcomes) < 40


def test_full_size_is_flux_schnell_with_its_text_encoders() -> None:
    """T5-XXL's and CLIP-L's sizes: the configs of google/t5-v1_1-xxl and clip-vit-large-patch14."""
    full = Sizes()
    assert full.transformer == FLUX_SCHNELL and full.txt_length == 256 and full.side == 1024
    assert full.t5 == (24, 4096, 10240, 64) and full.clip == (12, 768, 3072, 12)
    assert (full.t5[1], full.clip[1]) == (FLUX_SCHNELL.context_in, FLUX_SCHNELL.vec_in)


def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (skipped,) = png(settings_of(tmp_path))
    assert isinstance(skipped, Skipped) and "there is no" in skipped.why

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 24 GB")

    monkeypatch.setattr(speed_png, "random_model", full)
    (skipped,) = png(settings_of(MODELS), TINY)
    assert skipped == Skipped("png", "CUDA out of memory. Tried to allocate 24 GB")


def test_a_png_is_the_picture() -> None:
    image = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    picture = speed_png.to_bytes(image)
    assert (
        picture.shape == (4, 6, 3) and np.abs(picture / 255 - image[0].permute(1, 2, 0).numpy()).max() < 0.002
    )
    with Image.open(io.BytesIO(speed_png.written(picture))) as read:
        assert read.format == "PNG" and np.array_equal(np.asarray(read), picture)
