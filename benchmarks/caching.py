"""Step caching: what thresholds save and cost, beside sampling without a cache with as much work.

    python3 run.py bench caching [--prompts 16] [--thresholds 0.05 ...] [--quick] [--threads 1] [--json FILE]

mini-dev in 28 steps, guidance 3.5, prompts of `bench adherence`, one image each, one at a time. A row for
each method and threshold of flux_core/sampling/step_cache.py:

  computed   steps of the 28 in which all blocks were computed, a mean over the images
  work       network passes that this amounts to: a skipped step still computes the first block
  speed-up   time of the full run over its time; medians of interleaved runs
  PSNR       in dB, of the image to that of the full run from the same noise
  1 - SSIM   the same for structure (Wang et al. 2004), 0 is equal
  plain      PSNR and 1 - SSIM of Euler with that many steps, rounded up, and no cache

Then the same for mini-schnell's four steps, of which none should be skipped. The last line is that of the
forecast at the node's default threshold, 0.1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flux_core.model.autoencoder import to_vae_space
from ..flux_core.model.spec import Conditioning
from ..flux_core.pipeline import Models, SampleRequest, draw_noise, sample
from ..flux_core.sampling.schedule import make_sigmas
from ..flux_core.sampling.solver import solver_named
from ..flux_core.sampling.step_cache import METHODS, Caching
from ..miniature.evaluate import FAMILY
from .generate import load_models, model_files
from .image_metrics import psnr, ssim
from .prompts import categories
from .report import add_json, parser_of, positive, write_report

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
DEFAULT = ("forecast", 0.1)
SIDE = 16
"""Side of the latent."""
MAX_PSNR = 120.0
"""Larger values, as of equal images, are reported as this."""
FIRST_SEED = 60_000
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


@dataclass(frozen=True)
class Generated:
    """An image [3, H, W] in 0..1, seconds of sampling, and the steps in which all blocks were computed."""

    image: Tensor
    seconds: float
    computed: int


class Generator:
    """Generates each of the prompts with one variant of the miniature, always from the same noise."""

    def __init__(self, variant: str, models: Models, texts: Sequence[str]) -> None:
        self.models, self.sampling, self.variant = models, FAMILY[variant], variant
        encoded = [models.text_encoders.encode([text]) for text in texts]
        self.prompts = [Conditioning(e.txt, e.pooled, self.sampling.guidance) for e in encoded]

    def generate(self, index: int, steps: int, caching: Caching | None = None) -> Generated:
        """The image of the prompt with that index."""
        cache = None if caching is None else caching.new_cache()
        noise = draw_noise(FIRST_SEED + index, 1, SIDE, SIDE)
        request = SampleRequest(
            self.prompts[index],
            noise,
            torch.zeros_like(noise),
            make_sigmas(steps, SIDE * SIDE // 4, shift=self.sampling.shift),
            solver_named("euler"),
            new_cache=None if cache is None else lambda: cache,
        )
        start = time.perf_counter()
        latent = sample(self.models.transformer, request)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            image = self.models.autoencoder.decode(to_vae_space(latent))[0]
        return Generated((image.clamp(-1, 1) + 1) / 2, seconds, steps if cache is None else cache.computed)

    def first_block_share(self) -> float:
        """Work of the first block over that of all blocks, by the weights that each token meets."""
        model = self.models.transformer
        # a double block has separate weights for each stream: a token meets half of them
        double = [_weights(block) / 2 for block in model.double_blocks]
        return double[0] / (sum(double) + sum(_weights(block) for block in model.single_blocks))


def _weights(block: nn.Module) -> int:
    """Parameters of a block that a token meets: all but those of the modulations."""
    modulation = ("mod.lin", "modulation.lin")
    named = block.named_parameters()
    return sum(p.numel() for name, p in named if not any(part in name for part in modulation))


def compare(images: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, float]:
    """Mean PSNR (at most MAX_PSNR) and mean 1 - SSIM of images to their references."""
    pairs = list(zip(images, references, strict=True))
    decibels = statistics.fmean(min(MAX_PSNR, psnr(a, b)) for a, b in pairs)
    return decibels, statistics.fmean(1 - ssim(a, b) for a, b in pairs)


def measure(generator: Generator, thresholds: Sequence[float], on_row: Callable[[Row], None]) -> list[Row]:
    """A row for each method and threshold."""
    count, steps = len(generator.prompts), generator.sampling.steps
    share = generator.first_block_share()
    full = [generator.generate(i, steps).image for i in range(count)]
    plain: dict[int, tuple[float, float]] = {}
    rows = []
    for caching in [Caching(method, threshold) for method in METHODS for threshold in thresholds]:
        pairs = [(generator.generate(i, steps), generator.generate(i, steps, caching)) for i in range(count)]
        cached = [one for _, one in pairs]
        computed = statistics.fmean(one.computed for one in cached)
        work = computed + (steps - computed) * share
        as_many = min(steps, math.ceil(work - 1e-9))
        if as_many not in plain:
            plain[as_many] = compare([generator.generate(i, as_many).image for i in range(count)], full)
        decibels, distance = compare([one.image for one in cached], full)
        row = Row(
            generator.variant,
            caching.method,
            caching.threshold,
            computed,
            work,
            statistics.median(again.seconds / one.seconds for again, one in pairs),
            decibels,
            distance,
            as_many,
            *plain[as_many],
        )
        rows.append(row)
        on_row(row)
    return rows


def main(argv: list[str]) -> int:
    """Measure mini-dev and mini-schnell, print a line for each row; the exit code, 0."""
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
        generator = Generator(variant, load_models(model_files(arguments.models, variant)), texts)
        rows += measure(generator, arguments.thresholds, lambda row: print(row.line(), flush=True))
    steps = FAMILY["schnell"].steps
    skipped = any(row.variant == "schnell" and row.computed < steps for row in rows)
    found = "steps were skipped, the threshold is too high for it" if skipped else "no step was skipped"
    print(f"mini-schnell in {steps} steps: {found}")
    write_report(arguments, "caching", {"rows": [asdict(row) for row in rows]})
    if (row := headline(rows)) is not None:
        print(f"speed_up {row.speed_up:.2f} psnr {row.psnr:.1f} plain_psnr {row.plain_psnr:.1f}")
    return 0


def headline(rows: Sequence[Row]) -> Row | None:
    """mini-dev's row at the node's default settings, None if they were not measured."""
    found = (row for row in rows if row.variant == "dev" and (row.method, row.threshold) == DEFAULT)
    return next(found, None)
