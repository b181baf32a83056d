"""The miniature's text encoders: one token a word, and files that load as what was trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import load_text_encoders
from rectiflux.flux_core.train import text
from rectiflux.flux_core.train.scenes import ATTRIBUTES, Scene


def test_the_worlds_words_are_one_token_each() -> None:
    tokenizer = text.make_tokenizer()
    words = {word for values in ATTRIBUTES.values() for value in values for word in value.split()}
    for word in (*words, "background", "a", "on", "with", "middle"):
        assert len(tokenizer.encode(word).ids) == 1, word
    assert tokenizer.encode("  A RED Circle ").ids == tokenizer.encode("a red circle").ids


@pytest.mark.parametrize("words", ["ein roter Kreis", "красный круг", "赤い円", "🎈", ""])
def test_any_text_can_be_read_and_told_apart(words: str) -> None:
    """Unknown words fall into bytes, and nothing is lost."""
    tokenizer = text.make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(words).ids).strip() == words.lower()


def test_marks_stand_around_the_text() -> None:
    tokenizer = text.with_marks(text.make_tokenizer(), "<s> $A </s>")
    ids = tokenizer.encode("red").ids
    start, end = (tokenizer.token_to_id(mark) for mark in (text.START, text.END))
    assert (ids[0], ids[-1], len(ids)) == (start, end, 3)


def test_labels_are_the_attributes_places_in_the_table() -> None:
    scenes = [Scene("circle", "red", None, "left", None), Scene("cross", "pink", "large", "center", "navy")]
    labels = text.labels_of(scenes)
    for name, values in ATTRIBUTES.items():
        for label, scene in zip(labels[name].tolist(), scenes, strict=True):
            value = asdict(scene)[name]
            assert (label == 0 and value is None) or values[label - 1] == value


def test_a_reader_that_knows_has_no_loss() -> None:
    """Heads whose weights point at one-hot states: all right, and a cross-entropy near zero."""
    reader = text.Reader()
    labels = text.labels_of([Scene("star", "green", "small", "top", "sky")])
    state = torch.zeros(1, text.WIDTH)
    state[0, 0] = 1.0
    for name, head in reader.heads.items():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.weight.data[labels[name][0], 0] = 30.0
    loss, right = reader.loss(state, labels)
    assert right == 1.0 and loss.item() < 1e-6


def test_the_files_load_as_what_was_trained(tmp_path: Path) -> None:
    trained = text.train_text(tmp_path, 3, batch=4)
    loaded = load_text_encoders(
        tmp_path / "rectiflux-mini-clip.safetensors", tmp_path / "rectiflux-mini-t5.safetensors"
    )
    assert loaded.txt_length == text.TXT_LENGTH and loaded.clip_length == text.CLIP_LENGTH
    for prompt in ("a red circle", "", "ünbekannt"):
        found, expected = loaded.encode([prompt]), trained.encode([prompt])
        assert torch.equal(found.txt, expected.txt) and torch.equal(found.pooled, expected.pooled)


@pytest.mark.slow
def test_they_learn_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The progress line's last words after 150 steps: most captions read right in all five attributes."""
    text.train_text(tmp_path, 150)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    shares = [float(word) for word in last.replace(",", "").split() if word.startswith(("0.", "1."))]
    assert min(shares[-2:]) > 0.5, last
