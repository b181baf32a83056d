"""Step caching, honestly: what thresholds save and cost, beside plain sampling with as much work.

    python3 run.py bench caching [--prompts 16] [--thresholds 0.05 ...] [--quick] [--threads 1] [--json FILE]

mini-dev in 28 steps, guidance 3.5, prompts of `bench adherence`, one picture each, one at a time. A row for
each method and threshold of flux_core/sampling/step_cache.py:

  computed   steps of the 28 in which all blocks were computed, a mean over the pictures
  work       network passes that all of it comes to: a skipped step still computes the first block
  speed-up   time of the full run over its time; medians of runs that took turns
  PSNR       in dB, of the picture to that of the full run, from the same noise
  1 - SSIM   the same, of structures (Wang et al. 2004), 0 is equal
  plain      PSNR and 1 - SSIM of Euler with that many steps, rounded up, and no cache

Then the same for mini-schnell's four steps, in which nothing is to be skipped. The last line is of the
forecast at the node's own threshold, 0.1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux_core.model.autoencoder import to_vae_space
from ..flux_core.model.spec import Conditioning
from ..flux_core.pipeline import Models, SampleRequest, draw_noise, sample
from ..flux_core.sampling.schedule import make_sigmas
from ..flux_core.sampling.solver import solver_named
from ..flux_core.sampling.step_cache import METHODS, Caching, StepCache
from ..miniature.evaluate import FAMILY
from .generate import files_of, load_models
from .prompts import categories
from .report import add_json, parser_of, positive, write_report

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
DEFAULT = ("forecast", 0.1)
SIDE = 16
"""Positions along a latent's side."""
HEAD = (
    f"{'variant':9}{'method':13}{'threshold':>9}{'computed':>10}{'work':>7}{'speed-up':>10}{'PSNR':>8}"
    f"{'1 - SSIM':>10}{'plain: steps':>14}{'PSNR':>8}{'1 - SSIM':>10}"
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    variant: str
    method: str
    threshold: float
    computed: float
    work: float
    speed_up: float
    psnr: float
    distance: float
    plain_steps: int
    plain_psnr: float
    plain_distance: float

    def line(self) -> str:
        return (
            f"{self.variant:9}{self.method:13}{self.threshold:9.2f}{self.computed:10.1f}{self.work:7.1f}"
            f"{self.speed_up:9.2f}x{self.psnr:8.1f}{self.distance:10.4f}"
            f"{self.plain_steps:14d}{self.plain_psnr:8.1f}{self.plain_distance:10.4f}"
        )


class Painter:
    """Paints one prompt after the other with one member of the family, always from the same noise."""

    def __init__(self, variant: str, models: Models, texts: Sequence[str]) -> None:
        self.models, self.way, self.variant = models, FAMILY[variant], variant
        encoded = [models.text_encoders.encode([text]) for text in texts]
        self.prompts = [Conditioning(e.txt, e.pooled, self.way.guidance) for e in encoded]

    def paint(
        self, number: int, steps: int, caching: Caching | None = None
    ) -> tuple[Tensor, StepCache | None, float]:
        """(picture [3, H, W] in 0..1, what the cache did, seconds of the denoising)."""
        memory = None if caching is None else caching.new_cache()
        noise = draw_noise(60_000 + number, 1, SIDE, SIDE)
        sigmas = make_sigmas(steps, SIDE * SIDE // 4, shift=self.way.shift)
        start = time.perf_counter()
        latent = sample(
            self.models.transformer,
            SampleRequest(
                self.prompts[number],
                noise,
                torch.zeros_like(noise),
                sigmas,
                solver_named("euler"),
                new_cache=None if memory is None else lambda: memory,
            ),
        )
        seconds = time.perf_counter() - start
        with torch.no_grad():
            image = self.models.autoencoder.decode(to_vae_space(latent))[0]
        return (image.clamp(-1, 1) + 1) / 2, memory, seconds

    def first_block_share(self) -> float:
        """Work of the first block over that of all, by the weights that every token meets."""

        def weights(blocks: Sequence[torch.nn.Module]) -> int:
            modulation = ("mod.lin", "modulation.lin")
            return sum(
                p.numel()
                for block in blocks
                for name, p in block.named_parameters()
                if not any(part in name for part in modulation)
            )

        # a double block has weights for either stream, a token meets only half of them
        model = self.models.transformer
        double = [weights([block]) / 2 for block in model.double_blocks]
        return double[0] / (sum(double) + weights(list(model.single_blocks)))


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal to noise ratio in dB, at most 120, of pictures [3, H, W] in 0..1."""
    error = float((picture - reference).square().mean())
    return 120.0 if error < 1e-12 else -10 * math.log10(error)


def structure(picture: Tensor, reference: Tensor) -> float:
    """1 - SSIM of pictures [3, H, W] in 0..1, window 11 with sigma 1.5 (Wang et al. 2004, section III.B)."""
    at = torch.arange(11.0) - 5
    weight = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (weight[:, None] * weight / weight.sum() ** 2)[None, None]

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x[:, None], window)

    a, b = picture.float(), reference.float()
    mean_a, mean_b = smooth(a), smooth(b)
    spread_a, spread_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return 1 - float((light * (2 * both + c2) / (spread_a + spread_b + c2)).mean())


def measure(painter: Painter, thresholds: Sequence[float], on_row: Callable[[Row], None]) -> list[Row]:
    """A row for each method and threshold."""
    count, steps = len(painter.prompts), painter.way.steps
    share = painter.first_block_share()
    full = [painter.paint(number, steps)[0] for number in range(count)]
    plain: dict[int, tuple[float, float]] = {}
    rows = []
    for method in METHODS:
        for threshold in thresholds:
            caching = Caching(method, threshold)
            found, ratios = [], []
            for number in range(count):
                again = painter.paint(number, steps)[2]
                picture, memory, seconds = painter.paint(number, steps, caching)
                ratios.append(again / seconds)
                assert memory is not None
                near = psnr(picture, full[number]), structure(picture, full[number])
                found.append((memory.computed, *near))
            computed, decibels, distance = (statistics.fmean(values) for values in zip(*found, strict=True))
            work = computed + (steps - computed) * share
            as_many = min(steps, math.ceil(work - 1e-9))
            if as_many not in plain:
                others = [painter.paint(number, as_many)[0] for number in range(count)]
                pairs = list(zip(others, full, strict=True))
                plain[as_many] = (
                    statistics.fmean(psnr(a, b) for a, b in pairs),
                    statistics.fmean(structure(a, b) for a, b in pairs),
                )
            speed_up = statistics.median(ratios)
            row = Row(
                painter.variant,
                method,
                threshold,
                computed,
                work,
                speed_up,
                decibels,
                distance,
                as_many,
                *plain[as_many],
            )
            rows.append(row)
            on_row(row)
    return rows


def main(argv: list[str]) -> int:
    """Measure mini-dev and mini-schnell, print a line for each row; 0."""
    parser = parser_of("caching", __doc__)
    parser.add_argument("--prompts", type=positive, default=16, help="prompts, spread over the categories")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--quick", action="store_true", help="two prompts: does it run at all?")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder of models")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if not all(threshold >= 0 for threshold in arguments.thresholds):
        parser.error("thresholds must be at least 0")
    torch.set_num_threads(arguments.threads)
    every = [prompt.text for prompt in categories()]
    count = min(2 if arguments.quick else arguments.prompts, len(every))
    texts = [every[i * len(every) // count] for i in range(count)]
    print(HEAD)
    rows: list[Row] = []
    for variant in ("dev", "schnell"):
        models = load_models(files_of(arguments.models, variant))
        painter = Painter(variant, models, texts)
        rows += measure(painter, arguments.thresholds, lambda row: print(row.line(), flush=True))
    skipped = any(row.variant == "schnell" and row.computed < FAMILY["schnell"].steps for row in rows)
    print(
        "mini-schnell in 4 steps: "
        + (
            "steps were skipped, at thresholds that are too high for it"
            if skipped
            else "the cache does nothing"
        )
    )
    write_report(arguments, "caching", {"rows": [asdict(row) for row in rows]})
    if (row := headline(rows)) is not None:
        print(f"speed_up {row.speed_up:.2f} psnr {row.psnr:.1f} plain_psnr {row.plain_psnr:.1f}")
    return 0


def headline(rows: Sequence[Row]) -> Row | None:
    """mini-dev's row of the node's own settings, where its threshold was measured."""
    return next(
        (row for row in rows if row.variant == "dev" and (row.method, row.threshold) == DEFAULT), None
    )
