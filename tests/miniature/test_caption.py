"""Captions: no word has two meanings, every stated attribute is named, and a typo changes one word."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from rectiflux.miniature.caption import (
    BACKGROUND_WORDS,
    COLOR_WORDS,
    NO_SHADOW,
    NUMBER_WORDS,
    OPPOSITE,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Phrasing,
    caption,
    misspell,
    plain_caption,
)
from rectiflux.miniature.scene import (
    Item,
    Scene,
    random_scene,
    with_stated_attributes,
)

ROLES = [SHAPE_WORDS, COLOR_WORDS, SIZE_WORDS, BACKGROUND_WORDS, NUMBER_WORDS, PLACE_WORDS, RELATION_WORDS]


def said(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    rng = random.Random(seed)
    scenes = [with_stated_attributes(random_scene(rng), rng) for _ in range(count)]
    return [(scene, caption(scene, rng)) for scene in scenes]


@pytest.mark.parametrize("words", ROLES)
def test_no_word_has_two_meanings(words: dict[str, tuple[str, ...]]) -> None:
    assert max(Counter(word for synonyms in words.values() for word in synonyms).values()) == 1


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene(), ""),
        (Scene((Item("circle"),)), "a circle"),
        (Scene((Item(None, "red"),)), "a red shape"),
        (Scene((Item("star", "orange", "small"),), place="top left"), "a small orange star in the top left"),
        (Scene((Item("star", "orange"),), background="sky"), "an orange star on a sky background"),
        (Scene((Item("cross"),) * 3), "three crosses"),
        (Scene((Item("square", "blue"),) * 2, shadow=False), "two blue squares, without a shadow"),
        (Scene((Item("circle", "red"), Item("square", "blue"))), "a red circle and a blue square"),
        (Scene((Item("circle"), Item("square")), "below"), "a circle below a square"),
        (Scene((Item("heart"),), without="red"), "a heart, not red"),
    ],
)
def test_the_plainest_words(scene: Scene, text: str) -> None:
    assert plain_caption(scene) == text


def words_for(scene: Scene) -> list[tuple[str, ...]]:
    """For each stated attribute, the words of which one must be in the caption."""
    found = []
    for item in set(scene.items):
        found.append(SHAPE_WORDS[str(item.shape)])
        found += [COLOR_WORDS[item.color]] if item.color else []
        found += [SIZE_WORDS[item.size]] if item.size else []
    if scene.kind == "count":
        found.append(NUMBER_WORDS[len(scene.items)])
    if scene.relation:
        found.append(RELATION_WORDS[scene.relation] + RELATION_WORDS[OPPOSITE[scene.relation]] + ("on the",))
    found += [PLACE_WORDS[scene.place]] if scene.place else []
    found += [BACKGROUND_WORDS[scene.background]] if scene.background else []
    found += [NO_SHADOW] if not scene.shadow else []
    found += [(scene.without,)] if scene.without else []
    return found


def test_captions_name_every_stated_attribute() -> None:
    """All of it but for one caption in eight, whose typo hides a thing or two of one word."""
    hidden = 0
    captions = said(1500)
    for scene, text in captions:
        missing = [words for words in words_for(scene) if not any(word in text.lower() for word in words)]
        assert len(missing) <= 2, (scene, text)
        hidden += bool(missing)
    assert 0 < hidden / len(captions) < 0.12


def test_captions_name_no_unspecified_color() -> None:
    """Where only shapes are stated."""
    for scene, text in said(1500, seed=1):
        if scene.background or scene.without or any(item.color for item in scene.items):
            continue
        assert not {word for words in COLOR_WORDS.values() for word in words} & set(text.lower().split())


def test_swapping_the_order_swaps_the_relation() -> None:
    """In whichever order two are named, the words say that the circle is left of the square."""
    scene = Scene((Item("circle"), Item("square")), "left")
    texts = set()
    for seed in range(300):
        text = Phrasing(random.Random(seed)).objects(scene)
        texts.add(text)
        names = {word: name for name, words in SHAPE_WORDS.items() for word in words}
        order = [names[word] for word in text.replace(",", "").split() if word in names]
        assert sorted(order) == ["circle", "square"]
        turned = text.startswith(("left", "right", "to the", "on the"))  # "left of a square is a circle"
        leftward = "left" in text.split(" and ")[0]  # "a circle on the left and a square on the right"
        assert (order[0] == "circle") == (leftward != turned), text
    assert len(texts) > 50


def test_a_typo_changes_exactly_one_word_of_four_letters_or_more() -> None:
    rng = random.Random(4)
    for scene, _ in said(500, seed=4):
        text = plain_caption(scene)
        words, slipped = text.split(" "), misspell(text, rng).split(" ")
        changed = [(a, b) for a, b in zip(words, slipped, strict=True) if a != b]
        assert len(changed) == 1
        word, slip = changed[0]
        assert len(word) >= 4 and abs(len(word) - len(slip)) <= 1
        assert word[0] == slip[0] and len(set(word) & set(slip)) >= len(set(word)) - 1
