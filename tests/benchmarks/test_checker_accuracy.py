"""The checker's accuracy: on true renders, near misses and decoded images."""

from __future__ import annotations

import random

from rectiflux.benchmarks.checker_accuracy import (
    any_scene,
    autoencoder_accuracy,
    checker_accuracy,
    near_misses,
)
from rectiflux.miniature.autoencoder import new_autoencoder
from rectiflux.miniature.scene import BACKGROUNDS


def test_the_scenes_cover_everything_that_can_be_drawn() -> None:
    rng = random.Random(0)
    scenes = [any_scene(rng) for _ in range(600)]
    assert 0 < sum(scene.is_held_out() for scene in scenes) < 150
    assert {scene.kind for scene in scenes} == {"single", "pair", "count"}
    found = checker_accuracy(100, seed=1)
    assert found["accuracy"] == 1.0 and found["false_accepts"] <= 0.01
    assert set(found["accuracy_by_size"]) == {"128x128", "160x112", "112x160", "192x192", "256x256"}
    kinds = "shape colour background without count shadow size place relation direction binding".split()
    assert set(found["false_accepts_by_kind"]) == set(kinds)


def test_near_misses_differ_from_the_true_scene_in_their_attribute() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = any_scene(rng)
        found = dict(near_misses(scene, rng))
        assert all(wrong != scene for wrong in found.values())
        assert abs(len(found["count"].items) - len(scene.items)) == 1
        assert found["background"].background in BACKGROUNDS
        assert found["without"].without in {item.color for item in scene.items}
        if "binding" in found:
            pairs = [{(item.shape, item.color) for item in one.items} for one in (scene, found["binding"])]
            assert not pairs[0] & pairs[1]


def test_an_untrained_autoencoder_passes_nothing() -> None:
    found = autoencoder_accuracy(new_autoencoder(0), 16)
    assert found["passes"] == 0.0 and found["psnr"] < 20
