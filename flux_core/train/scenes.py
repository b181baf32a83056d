"""The miniature's world: pictures of one coloured object, drawn and captioned by the project itself.

A `Scene` is what a caption can say; `draw` turns it into a picture, `caption` into words. Everything else
that a picture shows (the exact place and size, the light) is drawn at random or follows from the scene, so a
checker that knows the scene can judge any picture (checker.py).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (214, 40, 48),
    "orange": (245, 135, 31),
    "yellow": (250, 214, 50),
    "green": (46, 160, 74),
    "blue": (38, 96, 214),
    "purple": (126, 58, 176),
    "pink": (244, 126, 178),
}
BACKGROUNDS = {
    "gray": (168, 170, 174),
    "beige": (232, 216, 186),
    "mint": (186, 228, 206),
    "lavender": (206, 198, 234),
    "sky": (172, 212, 242),
    "navy": (30, 40, 78),
}
SIZES = {"small": 0.15, "large": 0.24}
"""Radius of the object, as a part of the picture's shorter side."""
PLACES = {
    "center": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
    "top left": (-1.0, -1.0),
    "top right": (1.0, -1.0),
    "bottom left": (-1.0, 1.0),
    "bottom right": (1.0, 1.0),
}
"""Direction from the middle, (x, y), each -1, 0 or 1."""
OFFSET = 0.20
"""How far from the middle a place lies, as a part of each side."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class Scene:
    """What a caption can say. None means that the caption says nothing about it."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    background: str | None = None

    @classmethod
    def random(cls, rng: random.Random) -> Scene:
        """A scene with every attribute drawn uniformly."""
        return cls(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})

    def told(self, rng: random.Random, keep: float = 0.85) -> Scene:
        """The scene as a caption may tell it: shape and colour always, the others with probability `keep`."""
        said = {
            k: v if k in ("shape", "colour") or rng.random() < keep else None for k, v in asdict(self).items()
        }
        return Scene(**said)


def caption(scene: Scene, rng: random.Random) -> str:
    """One way to say the scene in words."""
    what = " ".join(word for word in (scene.size, scene.colour, scene.shape) if word)
    article = "an" if what[:1] in "aeiou" else "a"
    where = ""
    if scene.place:
        word = scene.place.replace("center", rng.choice(["center", "middle"]))
        where = rng.choice([f"in the {word}", f"at the {word}", word])
    ground = f"{scene.background} background" if scene.background else ""
    style = rng.randrange(3)
    if style == 0:
        parts = [what, where.removeprefix("in the ").removeprefix("at the "), ground]
        return ", ".join(part for part in parts if part)
    if style == 1 and ground:
        return f"a {ground} with {article} {what}" + (f", {where}" if where else "")
    return f"{article} {what}" + (f" on a {ground}" if ground else "") + (f", {where}" if where else "")


def outline(shape: str) -> np.ndarray:
    """Corners [points, 2], y downwards, of a shape of radius 1 about the origin; areas are 1.7 to 2.9."""
    if shape == "circle":
        angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return 0.95 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    if shape == "triangle":
        return np.array([(0.0, -1.05), (1.1, 0.85), (-1.1, 0.85)])
    if shape == "star":
        angle = -math.pi / 2 + np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.18, 0.52)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.06], axis=1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 15.5, -(y + 2.4) / 15.5], axis=1)
    if shape == "cross":
        a, b = 0.36, 1.05
        return np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        )
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def mask(shape: str, centre: tuple[float, float], radius: float, width: int, height: int) -> np.ndarray:
    """Coverage [height, width] in 0..1 of a shape about `centre` (x, y), in pixels."""
    scale = 4
    points = (outline(shape) * radius + np.asarray(centre)) * scale
    canvas = Image.new("L", (width * scale, height * scale))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def draw(scene: Scene, rng: random.Random, width: int = 128, height: int = 128) -> np.ndarray:
    """Picture uint8 [height, width, 3] of a scene with every attribute set (else ValueError).

    `rng` gives what a scene leaves open: the exact place and size.
    """
    if (
        scene.shape is None
        or scene.colour is None
        or scene.size is None
        or scene.place is None
        or scene.background is None
    ):
        raise ValueError(f"only a scene with every attribute set can be drawn, got {scene}")
    side = min(width, height)
    radius = SIZES[scene.size] * side * rng.uniform(0.94, 1.06)
    dx, dy = PLACES[scene.place]
    jitter = 0.018 * side
    centre = (
        width * (0.5 + OFFSET * dx) + rng.uniform(-jitter, jitter),
        height * (0.5 + OFFSET * dy) + rng.uniform(-jitter, jitter),
    )
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ground = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    light = 1.06 - 0.14 * (y / height)
    picture = ground * light[..., None]

    cover = mask(scene.shape, centre, radius, width, height)
    shadow_at = (centre[0] + 0.10 * radius, centre[1] + 0.20 * radius)
    shadow = Image.fromarray((mask(scene.shape, shadow_at, radius, width, height) * 255).astype(np.uint8))
    soft = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.032 * side)), dtype=np.float32) / 255
    picture *= 1 - 0.30 * soft[..., None]

    across = ((x - centre[0]) + 1.4 * (y - centre[1])) / (2.4 * radius)
    body = (
        np.asarray(COLOURS[scene.colour], dtype=np.float32) * (1.0 - 0.16 * np.clip(across, -1, 1))[..., None]
    )
    glow = np.exp(-(((x - centre[0]) / radius + 0.35) ** 2 + ((y - centre[1]) / radius + 0.40) ** 2) / 0.18)
    body += 46 * glow[..., None]
    picture = picture * (1 - cover[..., None]) + body * cover[..., None]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
