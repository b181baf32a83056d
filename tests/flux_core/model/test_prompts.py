"""How a prompt is read: ComfyUI's weights, rows of tokens, and notices of what has no effect."""

from __future__ import annotations

import time

import pytest
import torch
from rectiflux.benchmarks.reference.text import save_text_encoders
from rectiflux.flux_core.model.prompts import (
    COMFY,
    LITERAL,
    PromptReader,
    Reading,
    fit,
    reading_notices,
    syntax_notices,
    weighted_parts,
)
from rectiflux.flux_core.model.text_encoders import TextEncoders
from rectiflux.flux_core.weights import load_text_encoders
from rectiflux.flux_core.weights.sentencepiece import t5_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁a",
    "▁red",
    "▁fox",
    "▁12",
    "▁cm",
    ",",
    "(",
    ")",
    ":",
    "red",
    "blue",
    "|",
]
T5 = PromptReader.of("T5", t5_tokenizer([(piece, -float(i)) for i, piece in enumerate(PIECES)]))


def words(end_id: int = 1) -> Tokenizer:
    """A tokenizer of whole words without an unknown token, whose template adds `end_id`."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 2}, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> TextEncoders:
    return load_text_encoders(*save_text_encoders(tmp_path_factory.mktemp("text")))


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.4) fox", [("a ", 1.0), ("red", 1.4), (" fox", 1.0)]),
        ("((fox))", [("fox", 1.1 * 1.1)]),
        ("((a:2) b:0.5)", [("a", 2.0), (" b", 0.5)]),
        (r"a \(red\) fox", [("a (red) fox", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
        ("a) (b:2)", [("a) (b:2)", 1.0)]),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("(a:b) (c:nan) (d:inf)", [("a:b", 1.1), (" ", 1.0), ("c:nan", 1.1), (" ", 1.0), ("d:inf", 1.1)]),
        ("(a:-0.5)()", [("a", -0.5)]),
        ("", []),
    ],
)  # fmt: skip
def test_weights_are_comfyuis(prompt: str, parts: list[tuple[str, float]]) -> None:
    """Values of ComfyUI's token_weights, except for weights that are not finite."""
    found = weighted_parts(prompt)[0]
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize(
    "prompt", ["(" * 20_000 + ")" * 20_000, "(" * 50_000, "[:" * 50_000, "__*" * 30_000, "(a:" * 40_000]
)
def test_hostile_brackets_take_no_time(prompt: str) -> None:
    start = time.process_time()
    weighted_parts(prompt)
    syntax_notices([prompt])
    assert time.process_time() - start < 5


def test_literal_is_the_default_and_brackets_are_text() -> None:
    plain = T5.read(r"a (red:12) \(fox\)")
    assert plain == T5.read(r"a (red:12) \(fox\)", LITERAL)
    assert len(plain.groups) == 1 and all(weight == 1.0 for _, weight, _ in plain.groups[0])
    weighted = T5.read("a (red:12) fox", COMFY).rows()[0]
    assert [(PIECES[id], weight) for id, weight, _ in weighted if weight != 1.0] == [("▁red", 12.0)]
    assert [part for *_, part in weighted] == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="'a1111'"):
        T5.read("a", "a1111")


def test_rows_of_a_long_prompt_take_time_proportional_to_it() -> None:
    """A prompt of 2 MB has a million tokens; copying the rest for each row took half a minute."""
    tokens = tuple((id, 1.0, 1) for id in range(800_000))
    start = time.process_time()
    rows = Reading("CLIP", (tokens,), (0,), (1,), ()).rows(77)
    assert time.process_time() - start < 5
    assert tuple(token for row in rows for token in row[1:-1]) == tokens


def test_rows_keep_short_words_whole() -> None:
    """As ComfyUI fills rows: a part of fewer than 8 tokens starts the next row, a longer one is split."""
    text = "(" + "a " * 5 + ":1.2)" + "(" + "red " * 3 + ":1.3)"
    rows = T5.read(text, COMFY).rows(8)
    assert [[weight for _, weight, _ in row] for row in rows] == [[1.2] * 5 + [1.0], [1.3] * 3 + [1.0]]
    assert [len(row) for row in T5.read("a " * 9, COMFY).rows(8)] == [8, 3]
    assert [len(row) for row in T5.read("a " * 5).rows(4)] == [4, 3], "a row shorter than a short part"
    assert fit([1, 2, 3], 2, 0) == [1, 3] and fit([1, 2], 4, 0) == [1, 2, 0, 0]


def test_weights_scale_the_difference_to_an_empty_prompt(encoders: TextEncoders) -> None:
    """z = (z - empty) w + empty for the weighted tokens alone (ComfyUI, sd1_clip.py); CLIP has no weights."""
    plain, empty = encoders.encode(["a red circle"]), encoders.encode([""])
    weighted = encoders.encode(["a (red:1.5) circle"], weights=COMFY)
    expected = plain.txt.clone()
    expected[:, 1] = (plain.txt[:, 1] - empty.txt[:, 1]) * 1.5 + empty.txt[:, 1]
    assert torch.allclose(weighted.txt, expected, atol=1e-6)
    assert torch.equal(weighted.txt[:, 2:], plain.txt[:, 2:])
    assert weighted.pooled is not None and plain.pooled is not None
    assert torch.equal(weighted.pooled, plain.pooled)
    same = encoders.encode(["a (red:1) circle"], weights=COMFY)
    assert torch.equal(same.txt, plain.txt)


@pytest.mark.parametrize(
    ("prompt", "tags"),
    [
        ("a fox <lora:x:0.8> in <hypernet:y>", ["<lora:x:0.8>", "<hypernet:y>"]),
        ("embedding:none fox BREAK a hill", ["embedding:none", "BREAK"]),
        ("(embedding:bad_hands:1.2), fox", ["embedding:bad_hands:1.2"]),
        ("a [cat:dog:0.5] and [red|blue] fox", ["[cat:dog:0.5]", "[red|blue]"]),
        ("a fox AND a hill, __animal__ --ar 16:9", ["AND", "__animal__", "--ar 16:9"]),
        ("1.3::a fox:: on grass", ["1.3::a fox::"]),
        (
            "a fox\nNegative prompt: a hill\nSteps: 20, Sampler: Euler",
            ["Negative prompt:", "Steps: 20"],
        ),
    ],
)
def test_tags_of_other_programs_get_one_notice(prompt: str, tags: list[str]) -> None:
    (notice,) = syntax_notices([prompt, prompt], COMFY)
    assert all(tag in notice for tag in tags)
    assert "\n" not in notice


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red) fox",
        "((fox))",
        "[fox] {fox} <3",
        "a sign: ROCK AND ROLL, 16:9",
        "well-known -- a fox",
        r"a \(red:1.4\) fox",
    ],
)
def test_plain_text_gets_none(prompt: str) -> None:
    assert syntax_notices([prompt]) == []


def test_literal_weights_get_one_notice_that_names_the_widget() -> None:
    (notice,) = syntax_notices(["a (red:1.4) fox", "(b:2)"])
    assert "weights" in notice and "(red:1.4)" in notice and "(b:2)" in notice
    assert syntax_notices(["a (red:1.4) fox"], COMFY) == []
    assert len(syntax_notices(["x" * 10_000 + "(a\n:1.2)" * 500])[0]) < 400


def test_characters_that_t5_does_not_know() -> None:
    """Braces and Chinese are no pieces of T5-XXL either; CLIP's bytes know every character."""
    (notice,) = reading_notices([T5.read("红色的狐狸")], [512])
    assert "T5" in notice and "红" in notice and "1 of 2 tokens" in notice
    (notice,) = reading_notices([T5.read("a {red|blue} fox")], [512])
    assert "'{, }'" in notice and "2 of 8 tokens" in notice
    for prompt in ("a red fox, 12 cm", "a fox <lora:x:0.8>, a fox"):  # a tag has a notice of its own
        assert reading_notices([T5.read(prompt)], [512]) == []
    assert T5.read("红").rows()[0][-2][0] == PIECES.index("<unk>"), "ids are unchanged"
    (notice,) = reading_notices([T5.read("a \ud83e\n\udd8a")], [512])
    assert notice.encode() and "\n" not in notice


def test_a_tokenizer_that_fails_is_a_sentence() -> None:
    """Unknown words without an unknown token raise a bare Exception, broken templates a PanicException."""
    reader = PromptReader.of("CLIP", words())
    assert reader.read("a b").rows() == [[(0, 1.0, 1), (2, 1.0, 1), (1, 1.0, 0)]]
    with pytest.raises(ValueError, match="CLIP's tokenizer fails on 'a fox'"):
        reader.read("a fox")
