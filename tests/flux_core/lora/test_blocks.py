"""The text that gives single blocks their strengths."""

from __future__ import annotations

import pytest
from rectiflux.flux_core.lora import parse_blocks
from rectiflux.flux_core.lora.names import transformer_modules
from rectiflux.flux_core.model.spec import FLUX_DEV

MODULES = transformer_modules(FLUX_DEV)


def strengths(text: str, *names: str) -> list[float]:
    rules = parse_blocks(text, MODULES)
    return [rules.of(name) for name in names]


def test_the_documented_example() -> None:
    text = "double_blocks.0-9=0.5, single_blocks=0, *.img_attn=1"
    assert strengths(
        text,
        "double_blocks.0.txt_attn.qkv",
        "double_blocks.9.img_mlp.0",
        "double_blocks.10.img_mlp.0",
        "double_blocks.9.img_attn.proj",
        "single_blocks.37.linear1",
        "img_in",
    ) == [0.5, 0.5, 1.0, 1.0, 0.0, 1.0]


def test_no_text_leaves_every_layer_at_1() -> None:
    assert set(strengths("", *MODULES)) == {1.0} == set(strengths(" ,\n; ", *MODULES))


def test_a_star_is_any_name_and_alone_every_layer() -> None:
    assert set(strengths("*=0.25", *MODULES)) == {0.25}
    assert strengths(
        "double_blocks.*.*_mlp.2=2", "double_blocks.4.txt_mlp.2", "double_blocks.4.txt_mlp.0"
    ) == [2, 1]
    assert strengths("*_in=3", "img_in", "time_in.in_layer", "final_layer.linear") == [3, 3, 1]


def test_the_last_rule_that_fits_decides() -> None:
    assert strengths("single_blocks.3=0.2; single_blocks=0.7", "single_blocks.3.linear1") == [0.7]
    assert strengths("single_blocks=0.7\nsingle_blocks.3=0.2", "single_blocks.3.linear1") == [0.2]


def test_numbers_are_whole_pieces_and_may_be_negative() -> None:
    assert strengths("single_blocks.1=-1.5", "single_blocks.1.linear1", "single_blocks.11.linear1") == [
        -1.5,
        1,
    ]
    assert strengths(
        "single_blocks.3-11=0", *(f"single_blocks.{i}.norm.key_norm" for i in (2, 3, 11, 12))
    ) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "single_blocks",
            r"a block strength is written pattern=strength, got 'single_blocks'; write for example",
        ),
        ("=1", r"a block strength is written pattern=strength, got '=1'"),
        ("single_blocks=much", r"a block strength must be a number, got 'much' in 'single_blocks=much'"),
        ("single_blocks=nan", r"a block strength must be a number, got 'nan'"),
        ("single_blocks=1=2", r"a block strength must be a number, got '1=2'"),
        ("dubble_blocks=1", r"'dubble_blocks' is the beginning of no layer's name; write for example"),
        ("double_blocks.19=1", r"'double_blocks.19' is the beginning of no layer's name"),
        ("double_blocks.9-3=1", r"a range of blocks must rise, got 9-3 in 'double_blocks.9-3'"),
        ("double_blocks.=1", r"'double_blocks.' is the beginning of no layer's name"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blocks(text, MODULES)
