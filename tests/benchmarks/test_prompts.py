"""The prompts of the adherence benchmark: its own categories, and files of other prompts."""

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
    assert [(p.text, p.scene) for p in categories()] == [(p.text, p.scene) for p in categories()]


def test_prompts_differ() -> None:
    for name in (*SIX, "unseen", "words"):
        texts = [prompt.text for prompt in categories() if prompt.category == name]
        assert len(set(texts)) == len(texts)


def test_only_unseen_prompts_show_what_is_held_out() -> None:
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
    """Its templates (Ghosh et al. 2023, table 1), with our shapes for its objects."""
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


def test_what_a_line_leaves_out_is_open() -> None:
    found = parse_prompt('{"prompt": "3 stars", "objects": [{"shape": "star", "count": 3}], "shadow": true}')
    assert found == Prompt("3 stars", Scene((Item("star"),) * 3), "prompts")
    assert parse_prompt('{"prompt": "x", "objects": [{}], "place": null}').scene == Scene((Item(),))


LINE = '{"prompt": "a star", "objects": [{"shape": "star"}]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a star", "this is no JSON (Expecting value at character 1)"),
        ("[1]", "a line must be a JSON object with prompt, objects, relation, place, background, without, "),
        ('{"objects": [{}]}', "prompt must be words, got None"),
        ('{"prompt": " ", "objects": [{}]}', "prompt must be words, got ' '"),
        ('{"prompt": "x"}', "objects must be a list of at least one object, got None"),
        ('{"prompt": "x", "objects": []}', "objects must be a list of at least one object, got []"),
        ('{"prompt": "x", "objects": [1]}', "an object must be a JSON object with shape, colour, count, "),
        (
            '{"prompt": "x", "objects": [{}], "colour": "red"}',
            "a line has prompt, objects, relation, place, ",
        ),
        ('{"prompt": "x", "objects": [{"color": "red"}]}', "size, but no 'color'"),
        (
            '{"prompt": "x", "objects": [{"shape": "blob"}]}',
            "shape must be one of circle, square, triangle, ",
        ),
        ('{"prompt": "x", "objects": [{"colour": ["red"]}]}', "colour must be one of red, orange, "),
        ('{"prompt": "x", "objects": [{"count": 0}]}', "count must be a whole number from 1 to 5, got 0"),
        (
            '{"prompt": "x", "objects": [{"count": true}]}',
            "count must be a whole number from 1 to 5, got True",
        ),
        ('{"prompt": "x", "objects": [{"count": 3}, {"count": 3}]}', "may be 5 objects in all, got 6"),
        ('{"prompt": "x", "objects": [{}], "relation": "above"}', "a relation needs two objects, got 1"),
        ('{"prompt": "x", "objects": [{}], "shadow": "no"}', "shadow must be true or false, got 'no'"),
        ('{"prompt": "x", "objects": [{}], "category": 3}', "category must be a name, got 3"),
        ('{"prompt": "x", "objects": [{}], "place": "here"}', "place must be one of center, left, right, "),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{LINE}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="^mine.jsonl, line 3: ") as error:
        read_prompts(path)
    assert message in str(error.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.jsonl has no prompts; write one JSON object a line"):
        read_prompts(path)
