"""The miniature's text encoders: tokens, labels of captions, and files that load as trained."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rectiflux.flux_core import load_text_encoders
from rectiflux.miniature import text_encoders as text
from rectiflux.miniature.caption import plain_caption
from rectiflux.miniature.scene import BACKGROUNDS, COLORS, SHAPES, Item, Scene


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.make_tokenizer()


def test_words_of_captions_are_one_token_each(tokenizer: text.Tokenizer) -> None:
    for word in (*SHAPES, *COLORS, *BACKGROUNDS, "background", "a", "on", "with", "above", "left", "two"):
        assert len(tokenizer.encode(word).ids) == 1, word
    assert tokenizer.encode("  A RED Circle ").ids == tokenizer.encode("a red circle").ids


@pytest.mark.parametrize("words", ["ein roter Kreis", "красный круг", "赤い円", "🎈", ""])
def test_any_text_survives_tokenization(tokenizer: text.Tokenizer, words: str) -> None:
    """Unknown words become bytes, and nothing is lost."""
    assert tokenizer.decode(tokenizer.encode(words).ids).strip() == words.lower()


def test_captions_fit_the_encoders(tokenizer: text.Tokenizer) -> None:
    """The longest plain caption, special tokens included."""
    items = (Item("triangle", "yellow", "large"), Item("square", "purple", "small"))
    longest = plain_caption(Scene(items, "left", None, "lavender", shadow=False, without="red"))
    assert len(tokenizer.encode(longest).ids) + 2 <= text.TXT_LENGTH < text.CLIP_LENGTH


RED, BLUE = Item("circle", "red"), Item("star", "blue", "small")


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene(), {}),
        (Scene((RED,), place="top"), {"kind": "single", "first shape": "circle", "place": "top"}),
        (Scene((RED,) * 3, background="sky"), {"kind": "3", "first color": "red", "background": "sky"}),
        (Scene((RED, BLUE), "left"), {"axis": "across", "first shape": "circle", "second size": "small"}),
        (Scene((RED, BLUE), "right"), {"axis": "across", "first shape": "star", "second shape": "circle"}),
        (Scene((RED, BLUE), "below"), {"axis": "up and down", "first size": "small"}),
        (Scene((RED, BLUE)), {"kind": "pair", "axis": None, "first color": "red"}),
        (Scene((RED,), shadow=False, without="pink"), {"shadow": "none", "without": "pink"}),
    ],
)
def test_labels_name_the_left_or_upper_one_first(scene: Scene, expected: dict[str, str | None]) -> None:
    read = text.caption_labels(scene)
    assert read.keys() == text.LABELS.keys()
    assert {name: read[name] for name in expected} == expected
    if not expected:
        assert set(read.values()) == {None}


def test_a_probe_that_knows_has_no_loss() -> None:
    """Queries that find the second of two tokens, heads that read the answer there: a loss near zero."""
    probe = text.LabelProbe()
    labels = text.labels_of([Scene((BLUE,), None, "top", "sky")])
    tokens = torch.zeros(1, 2, text.WIDTH)
    tokens[0, 1, 0] = tokens[0, 0, 1] = 1.0
    probe.queries.data.zero_()
    probe.queries.data[:, 0] = 1000.0
    for name, head in probe.heads.items():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.weight.data[labels[name][0], 0] = 30.0
        head.weight.data[:, 1] = -30.0 * torch.arange(len(head.bias))  # what the first token says is wrong
    loss, right = probe.loss(tokens, labels)
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
def test_they_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last 20 of 200 small steps a fifth and more of the captions have all labels correct."""
    notes = list[str]()
    line = SimpleNamespace(update=lambda done, note: notes.append(note))
    monkeypatch.setattr(text, "ProgressLine", lambda steps: line)
    text.train_text(tmp_path, 200, batch=16)
    shares = [[float(share) for share in re.findall(r"\d\.\d\d", note)] for note in notes[-20:]]
    assert len(notes) == 200 and all(len(pair) == 2 for pair in shares)
    assert min(np.mean(shares, axis=0)) > 0.2, notes[-20:]
