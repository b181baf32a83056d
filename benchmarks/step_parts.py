"""The parts of a step that `bench time-spent` distinguishes: their operations, table and chart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .palette import FAINT, INK, PAPER, Color, font

OVERHEAD = "Python and launches"
OTHER = "other"
OPERATIONS = {
    "linear layers": r"mm|addmm|addmv|bmm|linear|t|matmul|_int_mm|_scaled_mm|(?!_reorder_).*linear.*",
    "attention": r".*(scaled_dot_product|attention|flash|sage).*|_?softmax|_reorder_linear_weight",
    "norms and modulation": r"(native_)?layer_norm",
    "q/k norm and rotary": (
        r"linalg_vector_norm|hypot|reciprocal_?|mul_?|div_?|complex|stack|sub|neg|rms_norm|_fused_rms_norm|pow|mean"
        r"|rsqrt"
    ),
    "GELU": r"gelu_?|sigmoid_?",
    "gated residuals": r"addcmul|add_?",
    "copies": r"cat|copy_|clone|contiguous|_to_copy|to|repeat",
    OVERHEAD: (
        r"view|_?reshape(_alias)?|_unsafe_view|view_as_(real|complex)|slice|select|narrow|transpose|permute|mT"
        r"|movedim|as_strided|expand(_as)?|split(_with_sizes)?|chunk|unflatten|flatten|(un)?squeeze|alias"
        r"|detach_?|lift_fresh|resolve_(conj|neg)|empty(_like|_strided)?|new_empty|result_type|unbind|item"
        r"|_local_scalar_dense|is_nonzero"
    ),
}
"""Part -> pattern of operation names without the namespace before ::. Views and allocations compute nothing
and count as overhead; addcmul also modulates a norm where the images of a batch have their own modulation."""
PARTS = (*(name for name in OPERATIONS if name != OVERHEAD), OTHER, OVERHEAD)
_PATTERNS = {part: re.compile(pattern) for part, pattern in OPERATIONS.items()}


def part_of(operation: str) -> str:
    """The part that an operation of torch belongs to, given with or without its overload."""
    name = _name(operation)
    return next((part for part, pattern in _PATTERNS.items() if pattern.fullmatch(name)), OTHER)


def _name(operation: str) -> str:
    return operation.rpartition("::")[2].partition(".")[0]


def by_context(operations: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The operations in order with their seconds, renamed where only their neighbors show the part.

    The four operations of a GELU without tanh (cpu_gelu.py: addcmul, mul_, sigmoid_, mul) become aten::gelu,
    and the matmuls around a softmax (cpu_attention.py) scaled_dot_product_attention.
    """
    renamed = list(operations)
    computing = [i for i, (name, _) in enumerate(renamed) if part_of(name) not in (OVERHEAD, "copies")]
    names = [_name(renamed[i][0]).removesuffix("_") for i in computing]
    for position, name in enumerate(names):
        if names[position : position + 4] == ["addcmul", "mul", "sigmoid", "mul"]:
            for i in computing[position : position + 4]:
                renamed[i] = ("aten::gelu", renamed[i][1])
        elif name == "_linear_pointwise" and {"softmax", "_softmax"} & {
            *names[max(0, position - 1) : position + 2]
        }:
            i = computing[position]
            renamed[i] = ("aten::scaled_dot_product_attention", renamed[i][1])
    return renamed


@dataclass(frozen=True)
class Part:
    """Seconds of a part in a step, and the lower bound for them, 0 without one."""

    name: str
    seconds: float
    floor: float


@dataclass(frozen=True)
class StepTime:
    """A step's seconds and its parts; `other` names operations that belong to no part, the longest first."""

    case: str
    seconds: float
    parts: tuple[Part, ...]
    other: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        return sum(part.floor for part in self.parts)

    @property
    def floor_share(self) -> float:
        """The sum of the floors over the step's time."""
        return self.floor / self.seconds

    def lines(self) -> str:
        """The table of one case."""
        rows = [f"{self.case}: a step takes {1000 * self.seconds:.2f} ms", HEAD]
        rows += [row(part.name, part.seconds, self.seconds, part.floor) for part in self.parts]
        rows.append(row("all", self.seconds, self.seconds, self.floor))
        if self.other:
            rows.append(f"other: {', '.join(self.other)}")
        return "\n".join([*rows, f"floor_share {self.case} {self.floor_share:.3f}"])


HEAD = f"{'part':22}{'ms':>10}{'share':>8}{'floor':>10}{'x floor':>9}"


def row(name: str, seconds: float, whole: float, floor: float) -> str:
    """One line of the table."""
    bound = f"{1000 * floor:10.3f}{seconds / floor:9.2f}" if floor else f"{'-':>10}{'-':>9}"
    return f"{name:22}{1000 * seconds:10.3f}{100 * seconds / whole:6.1f} %{bound}"


BAR, GAP, LABEL, WIDTH, MARGIN = 18, 8, 190, 520, 28  # pixels
TIME, FLOOR = (150, 170, 214), (38, 70, 140)


def draw_bars(cases: Iterable[StepTime]) -> Image.Image:
    """Each part's share of its step as a bar, its floor darker inside, one case below the other."""
    cases = list(cases)
    block = MARGIN + (len(PARTS) + 1) * (BAR + GAP)
    image = Image.new("RGB", (LABEL + WIDTH + 3 * MARGIN, MARGIN + len(cases) * block), PAPER)
    pen = ImageDraw.Draw(image)
    for position, case in enumerate(cases):
        top = MARGIN + position * block
        title = (
            f"{case.case}: {1000 * case.seconds:.2f} ms a step, floors {100 * case.floor_share:.0f} % of it"
        )
        pen.text((MARGIN, top), title, INK, font(15))
        for index, part in enumerate(case.parts):
            y = top + (index + 1) * (BAR + GAP)
            pen.text((MARGIN + LABEL - 10, y + BAR // 2), part.name, INK, font(13), "rm")
            bar(pen, y, part.seconds / case.seconds, TIME)
            bar(pen, y, part.floor / case.seconds, FLOOR)
            share = f"{100 * part.seconds / case.seconds:.1f} %"
            longest = max(part.seconds, part.floor) / case.seconds
            pen.text((MARGIN + LABEL + WIDTH * longest + 6, y + BAR // 2), share, FAINT, font(12), "lm")
    return image


def bar(pen: ImageDraw.ImageDraw, y: int, share: float, color: Color) -> None:
    """Draw a bar of this share of the whole width."""
    if share > 0:
        left = MARGIN + LABEL
        pen.rectangle((left, y, left + round(WIDTH * min(share, 1.0)), y + BAR), color)
