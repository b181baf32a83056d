"""The prompts of `bench adherence`: the built-in categories, and files of other prompts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from rectiflux.benchmarks import prompts as prompts_module
from rectiflux.benchmarks.prompts import SIX, Prompt, categories, parse_prompt, read_prompts
from rectiflux.miniature.scene import HELD_OUT_COUNTS, HELD_OUT_PAIRS, Item, Scene


def test_every_category_has_fifty_prompts_and_more() -> None:
    found = Counter(prompt.category for prompt in categories())
    assert tuple(found) == (*SIX, "unseen", "words")
    assert min(found.values()) >= 50
    assert len({(prompt.category, prompt.text) for prompt in categories()}) == len(categories())
    assert [(p.text, p.scene) for p in categories()] == [(p.text, p.scene) for p in categories()]


def test_only_unseen_prompts_have_held_out_combinations() -> None:
    for prompt in categories():
        assert prompt.scene.is_held_out() == (prompt.category == "unseen"), prompt
    unseen = [prompt.scene for prompt in categories() if prompt.category == "unseen"]
    pairs = {(item.shape, item.color) for scene in unseen for item in scene.items}
    counts = {(len(scene.items), scene.items[0].shape) for scene in unseen if scene.kind == "count"}
    assert pairs >= HELD_OUT_PAIRS and counts >= HELD_OUT_COUNTS


@pytest.mark.parametrize(
    ("category", "text", "kind"),
    [
        ("single object", "a circle", "single"),
        ("two objects", "a [a-z]+ and a [a-z]+", "pair"),
        ("counting", "(two|three|four) (circles|squares)", "count"),
        ("colours", "an? (red|blue|orange) [a-z]+", "single"),
        ("position", "a [a-z]+ (left of|right of|above|below) a [a-z]+", "pair"),
        ("attribute binding", "an? [a-z]+ [a-z]+ and an? [a-z]+ [a-z]+", "pair"),
    ],
)
def test_the_six_are_genevals(category: str, text: str, kind: str) -> None:
    """GenEval's templates (Ghosh et al. 2023, table 1), with our shapes as objects."""
    prompts = [prompt for prompt in categories() if prompt.category == category]
    assert any(re.fullmatch(text, prompt.text) for prompt in prompts)
    assert {prompt.scene.kind for prompt in prompts} == {kind}


def test_positions_and_words_are_balanced() -> None:
    prompts = categories()
    relations = Counter(p.scene.relation for p in prompts if p.category == "position")
    assert set(relations.values()) == {14} and len(relations) == 4
    words = [prompt for prompt in prompts if prompt.category == "words"]
    assert sum(prompt.text.isupper() for prompt in words) >= 14
    assert sum("no" in prompt.text or "without" in prompt.text for prompt in words) >= 14


def test_the_documented_line_is_read() -> None:
    example = re.search(r"\{\"prompt\".*?false\}", str(prompts_module.__doc__), re.DOTALL)
    assert example is not None
    items = (Item("circle", "red", "small"), Item("square", "blue"))
    scene = Scene(items, "left", "top left", "navy", False, "green")
    assert parse_prompt(example[0].replace(", ...", "")) == Prompt(
        "a small red circle left of a blue square", scene, "mine"
    )


def test_the_readmes_lines_are_read(tmp_path: Path) -> None:
    text = (Path(str(prompts_module.__file__)).parent / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.jsonl"
    path.write_text(text.split("```json")[1].split("```")[0], encoding="utf-8")
    first, second = read_prompts(path)
    assert first.scene == Scene((Item("circle", "red", "small"), Item("square", "blue")), "left")
    assert second.scene == Scene((Item("star"),) * 3, None, None, "navy", True, "green")
    assert (first.category, second.category) == ("prompts", "counting")


def test_absent_values_are_unspecified() -> None:
    found = parse_prompt('{"prompt": "3 stars", "objects": [{"shape": "star", "count": 3}], "shadow": true}')
    assert found == Prompt("3 stars", Scene((Item("star"),) * 3), "prompts")
    assert parse_prompt('{"prompt": "x", "objects": [{}], "place": null}').scene == Scene((Item(),))


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("a star", "JSON", "character 1"),
        ("[1]", "line", "[1]"),
        ('{"objects": [{}]}', "prompt", "None"),
        ('{"prompt": "x"}', "objects", "None"),
        ('{"prompt": "x", "objects": [{}], "colour": "red"}', "line", "'colour'"),
        ('{"prompt": "x", "objects": [{"color": "red"}]}', "object", "'color'"),
        ('{"prompt": "x", "objects": [{"shape": "blob"}]}', "shape", "'blob'"),
        ('{"prompt": "x", "objects": [{"colour": ["red"]}]}', "colour", "['red']"),
        ('{"prompt": "x", "objects": [{"count": 0}]}', "count", "0"),
        ('{"prompt": "x", "objects": [{"count": 3}, {"count": 3}]}', "objects", "6"),
        ('{"prompt": "x", "objects": [{}], "relation": "above"}', "relation", "1"),
        ('{"prompt": "x", "objects": [{}], "shadow": "no"}', "shadow", "'no'"),
        ('{"prompt": "x", "objects": [{}], "category": 3}', "category", "3"),
        ('{"prompt": "x", "objects": [{}], "place": "here"}', "place", "'here'"),
    ],
)
def test_an_invalid_line_is_named_with_key_and_value(tmp_path: Path, line: str, key: str, value: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "a star", "objects": [{{"shape": "star"}}]}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="^mine.jsonl, line 3: ") as error:
        read_prompts(path)
    assert key in str(error.value) and value in str(error.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.jsonl has no prompts"):
        read_prompts(path)
