"""Pairs of a teacher: what the files hold, what is kept on resuming, and what is drawn from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core.train.pairs import CAPTION_BYTES, PairInputs, PairSet, write_pairs
from torch import Tensor


def draw(k: int, size: int) -> PairInputs:
    noise = torch.randn(size, 16, 4, 8, generator=torch.Generator().manual_seed(k))
    return PairInputs(noise, [f"caption {k} {i}, grün" for i in range(size)], ["1", "2", "3", "4"][:size])


def generate(prompts: Sequence[str], noise: Tensor) -> Tensor:
    return noise * torch.tensor([float(prompt) for prompt in prompts])[:, None, None, None]


def test_a_pair_is_noise_caption_and_what_the_teacher_makes_of_noise_and_prompt(tmp_path: Path) -> None:
    """Six pairs in files of four; float16 throughout."""
    write_pairs(tmp_path, 6, draw, generate, batch=3, chunk=4)
    assert len(list(tmp_path.iterdir())) == 2
    noise, latents, captions = PairSet(tmp_path).batch(50, random.Random(0))
    assert noise.shape == latents.shape == (50, 16, 4, 8)
    for x, y, caption in zip(noise, latents, captions, strict=True):
        k, i = map(int, caption.removesuffix(", grün").split()[1:])
        expected = draw(k, 4 if k == 0 else 2)
        assert torch.equal(x, expected.noise[i].half().float())
        assert torch.equal(y, generate(expected.prompts, expected.noise)[i].half().float())


def test_existing_files_are_kept(tmp_path: Path) -> None:
    write_pairs(tmp_path, 4, draw, generate, chunk=4)
    first = tmp_path / "00000.safetensors"
    before = first.stat().st_mtime_ns
    write_pairs(tmp_path, 8, draw, generate, chunk=4)
    assert first.stat().st_mtime_ns == before and len(PairSet(tmp_path).files) == 2


def test_a_long_caption_is_cut(tmp_path: Path) -> None:
    def long(k: int, size: int) -> PairInputs:
        return draw(k, size)._replace(captions=["ü" * CAPTION_BYTES] * size)

    write_pairs(tmp_path, 1, long, generate)
    assert PairSet(tmp_path).batch(1, random.Random(0))[2] == ["ü" * (CAPTION_BYTES // 2)]


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pairs"):
        PairSet(tmp_path)
