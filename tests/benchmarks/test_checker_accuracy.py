"""What the benchmark says of the checker: true renders, near misses, an autoencoder's pictures."""

from __future__ import annotations

import random

from rectiflux.benchmarks.checker_accuracy import (
    any_scene,
    check_the_autoencoder,
    check_the_checker,
    near_misses,
)
from rectiflux.miniature.autoencoder import new_autoencoder
from rectiflux.miniature.scene import BACKGROUNDS


def test_the_checker_is_measured_on_all_that_can_be_drawn() -> None:
    rng = random.Random(0)
    scenes = [any_scene(rng) for _ in range(600)]
    assert 0 < sum(scene.is_held_out() for scene in scenes) < 150
    assert {scene.kind for scene in scenes} == {"single", "pair", "count"}
    found = check_the_checker(100, seed=1)
    assert found["accuracy"] == 1.0 and found["false_accepts"] <= 0.01
    assert set(found["accuracy_by_size"]) == {"128x128", "160x112", "112x160", "192x192", "256x256"}
    kinds = "shape colour background without count shadow size place relation direction binding".split()
    assert set(found["false_accepts_by_kind"]) == set(kinds)


def test_near_misses_differ_from_the_truth_in_what_they_say() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = any_scene(rng)
        found = dict(near_misses(scene, rng))
        assert all(told != scene for told in found.values())
        assert abs(len(found["count"].items) - len(scene.items)) == 1
        assert found["background"].background in BACKGROUNDS
        assert found["without"].without in {item.color for item in scene.items}
        if "binding" in found:
            pairs = [{(item.shape, item.color) for item in told.items} for told in (scene, found["binding"])]
            assert not pairs[0] & pairs[1]


def test_an_autoencoder_is_measured() -> None:
    """An untrained decoder passes nothing."""
    found = check_the_autoencoder(new_autoencoder(0), 16)
    assert found["passes"] == 0.0 and found["psnr"] < 20
