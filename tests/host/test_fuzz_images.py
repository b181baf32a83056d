"""Seeded damaged image files: each is read, or refused in one sentence, in bounded time and memory."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rectiflux.host.images import MAX_PIXELS, decode
from rectiflux.host.workflow import WorkflowError, read_document

from ..fuzzing import fuzz_inputs, fuzz_seed
from .image_fuzzer import ImageFuzzer

COUNT, SEED = fuzz_inputs(400), fuzz_seed()
PATIENCE = 5.0  # processor seconds for a file
MAX_MESSAGE = 500


def outcome(name: str, data: bytes, folder: Path) -> str:
    """ "read" or "refused". Raises AssertionError for an answer that is neither an image nor one sentence."""
    path = folder / name
    path.write_bytes(data)
    try:
        read_document(path)
    except WorkflowError as error:
        assert "\n" not in str(error) and len(str(error)) < MAX_MESSAGE + len(str(folder))
    try:
        decoded = decode(path, name)
    except ValueError as error:
        assert type(error) is ValueError, error
        assert str(error).startswith(name) and "\n" not in str(error) and len(str(error)) < MAX_MESSAGE
        return "refused"
    image, mask = decoded.tensors()
    assert image.shape[-1] == 3 and 0 < image[..., 0].numel() <= MAX_PIXELS
    assert 0 <= image.min() and image.max() <= 1 and 0 <= mask.min() and mask.max() <= 1
    assert mask.shape in (image.shape[:3], (len(image), 64, 64))
    return "read"


def test_damaged_images_are_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    fuzzer, seen = ImageFuzzer(SEED), Counter[str]()
    for number in range(COUNT):
        name, data = fuzzer.input()
        start = time.process_time()
        try:
            seen[outcome(name, data, tmp_path)] += 1
        except Exception as error:
            raise AssertionError(f"input {number}, {name}: {error!r}: {data[:200]!r}") from error
        assert time.process_time() - start < PATIENCE, f"input {number}, {name}: {data[:200]!r}"
    assert seen["read"] and seen["refused"], seen


def test_whole_files_are_read(tmp_path: Path) -> None:
    assert {outcome(name, data, tmp_path) for name, data in ImageFuzzer(0).files.items()} == {"read"}
