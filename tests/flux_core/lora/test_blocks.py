"""The text that gives single blocks their strengths."""

from __future__ import annotations

import re

import pytest
from rectiflux.flux_core.lora import parse_blocks
from rectiflux.flux_core.model.names import layer_names
from rectiflux.flux_core.model.spec import FLUX_DEV

MODULES = layer_names(FLUX_DEV)


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


def test_indices_are_whole_pieces_and_strengths_may_be_negative() -> None:
    assert strengths("single_blocks.1=-1.5", "single_blocks.1.linear1", "single_blocks.11.linear1") == [
        -1.5,
        1,
    ]
    assert strengths(
        "single_blocks.3-11=0", *(f"single_blocks.{i}.norm.key_norm" for i in (2, 3, 11, 12))
    ) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("single_blocks", "'single_blocks'"),
        ("=1", "'=1'"),
        ("single_blocks=much", "'much' in 'single_blocks=much'"),
        ("single_blocks=nan", "'nan'"),
        ("single_blocks=1=2", "'1=2'"),
        ("dubble_blocks=1", "'dubble_blocks'"),
        ("double_blocks.19=1", "'double_blocks.19'"),
        ("double_blocks.9-3=1", "9-3 in 'double_blocks.9-3'"),
        ("double_blocks.=1", "'double_blocks.'"),
    ],
)
def test_rules_that_cannot_be_parsed_or_fit_nothing(text: str, value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(value)):
        parse_blocks(text, MODULES)
