"""The case `png`: both sides generate the same image, with the miniature and with random models; no time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rectiflux
import torch
from rectiflux.benchmarks import speed_png
from rectiflux.benchmarks.interleaved import Clock, Ratio
from rectiflux.benchmarks.speed_png import Sizes, png
from rectiflux.benchmarks.speed_settings import Note, Outcome, Settings, Skipped
from rectiflux.flux_core.model.autoencoder import AutoEncoderSpec
from rectiflux.flux_core.model.spec import FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer

TINY = Sizes(
    FluxSpec(64, 1, 1, 1, context_in=64, vec_in=64),
    AutoEncoderSpec(ch=32),
    t5=(1, 64, 64, 1),
    clip=(1, 64, 64, 1),
    txt_length=8,
    side=32,
)


@pytest.fixture
def settings() -> Settings:
    return Settings(True, 0.0, Clock(), Path(rectiflux.__file__).parent / "models")


def ratio_and_difference(outcomes: list[Outcome]) -> tuple[Ratio, int]:
    """The ratio, and the largest difference of the images in levels of 255."""
    (ratio,) = (one for one in outcomes if isinstance(one, Ratio))
    (note,) = (one.text for one in outcomes if isinstance(one, Note))
    found = re.search(r"largest difference (\d+) of 255", note)
    assert found is not None
    return ratio, int(found[1])


def test_the_miniature_equals_diffusers(settings: Settings) -> None:
    ratio, difference = ratio_and_difference(list(png(settings)))
    assert ratio.case == "png-128" and difference <= 1


def test_random_models_equal_diffusers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, hence not to the level; without a compiler ours is eager."""

    def refuse(model: FluxTransformer) -> FluxTransformer:
        raise ValueError("compiling needs g++")

    monkeypatch.setattr("rectiflux.benchmarks.speed_gpu.compile_blocks", refuse)
    torch.manual_seed(0)
    ratio, difference = ratio_and_difference(list(png(settings, TINY)))
    assert ratio.case == "png-32" and "ours eager, compiling needs g++" in ratio.note
    assert difference < 40


def test_full_size_is_flux_schnell_with_its_text_encoders() -> None:
    """T5-XXL's and CLIP-L's sizes: the configs of google/t5-v1_1-xxl and clip-vit-large-patch14."""
    full = Sizes()
    assert full.transformer == FLUX_SCHNELL and full.txt_length == 256 and full.side == 1024
    assert full.t5 == (24, 4096, 10240, 64) and full.clip == (12, 768, 3072, 12)
    assert (full.t5[1], full.clip[1]) == (FLUX_SCHNELL.context_in, FLUX_SCHNELL.vec_in)


def test_what_is_skipped(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (skipped,) = png(Settings(True, 0.0, Clock(), tmp_path))
    assert isinstance(skipped, Skipped) and "rectiflux-mini-schnell" in skipped.reason

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 24 GB")

    monkeypatch.setattr(speed_png, "random_model", full)
    assert list(png(settings, TINY)) == [Skipped("png", "CUDA out of memory. Tried to allocate 24 GB")]
