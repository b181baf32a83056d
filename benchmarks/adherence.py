"""Does the miniature follow its prompts? GenEval's six categories and unseen ones.

    python3 run.py bench adherence [--variant pro|reflow|dev|schnell|kontext] [--steps N] [--solver S]
                                   [--cfg C] [--cfg-until SIGMA] [--seeds 4] [--prompts FILE]
                                   [--size 128x128] [--quick] [--json FILE] [--sheet FILE] [--models DIR]
                                   [--model FILE] [--vae FILE] [--text CLIP T5]

First the checker's own accuracy: the share of true renders that it accepts, of near misses that it accepts
wrongly, and of renders that it accepts after encoding and decoding. Then an image is generated from every
prompt and four noises. It is right when everything that the prompt says is in it and no other object is. A
category's score is the share of its images that are right; the overall score, the last line, is the mean over
the six categories of GenEval (Ghosh et al. 2023, arXiv:2310.11513). "unseen" are combinations that training
never draws or names (miniature/scene.py), "words" are synonyms, typos, "without" and capitals: neither
enters the overall score. With --prompts it is the mean over the categories of that file, whose format is
described in benchmarks/prompts.py. Sharpness is that of checker.py: 1.0 is as sharp as a render. Seconds per
image are those of text encoding, sampling and decoding, in batches. With --variant kontext the model edits
images by instructions instead: see benchmarks/edits.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..flux_core.model.autoencoder import AutoEncoder
from ..flux_core.pipeline import latent_size
from ..flux_core.sampling.schedule import SHIFTS
from ..flux_core.sampling.solver import solver_named
from ..flux_core.train.progress import ProgressLine
from ..miniature.evaluate import FAMILY, Sampling, image_grid
from ..miniature.kontext import SAMPLING as KONTEXT
from .checker_accuracy import autoencoder_accuracy, checker_accuracy
from .edits import run_edits
from .generate import Generate, ModelFiles, check_images, generate, load_models, model_files, scores
from .prompts import Prompt, categories, read_prompts
from .report import add_json, parser_of, positive, write_report

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str], generator: Generate | None = None) -> int:
    """Check the checker, generate the images (with `generator` if given), print scores; the exit code."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        print(f"overall {run(args, generator):.2f}")
    except (OSError, ValueError) as error:
        print(f"bench adherence: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, generator: Generate | None) -> float:
    """Everything but the last line; the overall score. Raises OSError and ValueError for invalid input."""
    if args.variant == "kontext":
        return run_edits(args, sampling_of(args))
    prompts = read_prompts(args.prompts) if args.prompts else categories()
    prompts, seeds, renders = (prompts[::8], 1, 100) if args.quick else (prompts, args.seeds, args.renders)
    latent_size(*args.size)
    sampling = sampling_of(args)
    autoencoder = None
    if generator is None:
        generator, autoencoder = load_generator(args, sampling)
    figures: dict[str, Any] = {"sampling": asdict(sampling), "checker": checker_accuracy(renders)}
    print_checker(figures["checker"])
    if autoencoder is not None:
        figures["autoencoder"] = autoencoder_accuracy(autoencoder, 16 if args.quick else 256)
        passes, noise = figures["autoencoder"]["passes"], figures["autoencoder"]["psnr"]
        print(
            f"autoencoder: {passes:.4f} of renders pass after encoding and decoding, {noise:.1f} dB",
            flush=True,
        )
    start = time.perf_counter()
    images = generator([prompt for prompt in prompts for _ in range(seeds)])
    figures["seconds_per_image"] = (time.perf_counter() - start) / len(images)
    figures |= scores(check_images(prompts, images, seeds))
    print_scores(figures)
    if args.sheet is not None:
        Image.fromarray(first_images(prompts, images, seeds)).save(args.sheet)
    write_report(args, "adherence", figures)
    return figures["overall"]


def parser() -> argparse.ArgumentParser:
    parser = parser_of("adherence", __doc__)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file with one JSON object a line, instead of the built-in prompts",
    )
    parser.add_argument(
        "--variant", choices=(*FAMILY, "kontext"), default="pro", help="variant of the miniature"
    )
    parser.add_argument("--steps", type=positive, help="steps, default the variant's own")
    parser.add_argument("--solver", help="solver, default the variant's own")
    parser.add_argument(
        "--cfg", type=float, help="CFG scale with the empty prompt, default the variant's own"
    )
    parser.add_argument(
        "--cfg-until", type=float, help="sigma below which CFG ends, default the variant's own"
    )
    parser.add_argument("--guidance", type=float, help="distilled guidance, default the variant's own")
    parser.add_argument("--shift", choices=SHIFTS, help="shift of the schedule, default the variant's own")
    parser.add_argument("--seeds", type=positive, default=4, help="images of each prompt")
    parser.add_argument("--size", type=_size, default=(128, 128), metavar="WxH", help="width and height")
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the prompts, one seed: does it run?"
    )
    parser.add_argument("--renders", type=positive, default=1000, help="true renders to test the checker on")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="contact sheet of eight prompts a category"
    )
    parser.add_argument(
        "--models", type=Path, default=ROOT / "models", metavar="DIR", help="folder of models"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="another transformer file")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="another autoencoder file")
    parser.add_argument("--text", type=Path, nargs=2, metavar=("CLIP", "T5"), help="other text encoder files")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    return parser


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT, such as 128x128")
    return int(width), int(height)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The variant's own sampling with the options given. Raises ValueError for an unknown solver."""
    given = {
        "steps": args.steps,
        "solver": args.solver,
        "cfg_scale": args.cfg,
        "cfg_until": args.cfg_until,
        "guidance": args.guidance,
        "shift": args.shift,
    }
    own = KONTEXT if args.variant == "kontext" else FAMILY[args.variant]
    sampling = replace(own, **{name: v for name, v in given.items() if v is not None})
    solver_named(sampling.solver)
    return sampling


def load_generator(args: argparse.Namespace, sampling: Sampling) -> tuple[Generate, AutoEncoder]:
    """A generator with the models of the options, and their autoencoder. Raises what loading raises."""
    files = model_files(args.models, args.variant)
    clip, t5 = args.text or (files.clip, files.t5)
    models = load_models(ModelFiles(args.model or files.transformer, args.vae or files.vae, clip, t5))

    def generator(prompts: Sequence[Prompt]) -> list[np.ndarray]:
        line = ProgressLine(len(prompts))
        width, height = args.size
        return generate(
            models, prompts, sampling, width, height, lambda done: line.update(done, "images generated")
        )

    return generator, models.autoencoder


def first_images(prompts: Sequence[Prompt], images: Sequence[np.ndarray], seeds: int) -> np.ndarray:
    """A contact sheet, a row for each category: the first image of eight of its prompts, evenly spread."""
    rows: dict[str, list[np.ndarray]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt.category, []).append(images[i * seeds])
    chosen = [
        row[k * len(row) // 8] if len(row) >= 8 else row[k % len(row)]
        for row in rows.values()
        for k in range(8)
    ]
    return image_grid(chosen, 8)


def print_checker(found: dict[str, Any]) -> None:
    by_size = "  ".join(f"{size} {share:.3f}" for size, share in found["accuracy_by_size"].items())
    by_kind = "  ".join(f"{kind} {share:.3f}" for kind, share in found["false_accepts_by_kind"].items())
    print(f"checker: {found['accuracy']:.4f} of {found['renders']} true renders pass ({by_size})")
    print(f"checker: {found['false_accepts']:.4f} of {found['mismatches']} near misses pass ({by_kind})")


def print_scores(figures: dict[str, Any]) -> None:
    print(f"{'category':20}score    images  share of images right in each attribute asked for")
    for name, row in figures["categories"].items():
        parts = "  ".join(f"{key} {share:.2f}" for key, share in row["attributes"].items())
        print(f"{name:20}{row['score']:5.2f}  {row['images']:8}  {parts}")
    print(f"{figures['seconds_per_image']:.3f} seconds an image, sharpness {figures['sharpness']:.2f}")
