"""`python3 run.py train`: the miniature family, from scratch to the files in models/, in resumable stages.

text         captions            -> T5 and CLIP text encoders
data         rendered scenes     -> the autoencoder's encoder, and a file of latents
base         latents and texts   -> mini-pro, the undistilled transformer      (the longest stage)
autoencoder  rendered scenes     -> the autoencoder's decoder
guidance     mini-pro            -> mini-dev, distilled guidance
kontext      mini-dev, edits     -> mini-kontext, edits an image by an instruction      (only when named)
canny        mini-dev, edges     -> mini-canny, follows edges                           (only when named)
fill         mini-dev, holes     -> mini-fill, fills a hole in an image                 (only when named)
pairs        mini-pro            -> noise, and the latents that its guided ODE makes of it
reflow       mini-dev, pairs     -> a straightened flow
schnell      the straight flow   -> mini-schnell, four steps
reading      mini-schnell        -> its front distilled to recover unspecified colors from the noise
decide       both                -> mini-schnell, one to four steps
export       all of these        -> half-precision files under models/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from ..flux_core.model.autoencoder import AutoEncoder
from ..flux_core.model.spec import CONTROL_CHANNELS, FILL_CHANNELS, FluxSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.train.checkpoint import write_safetensors
from ..flux_core.train.conditional import (
    ConditionalRecipe,
    ImageData,
    train_conditional,
    with_input_channels,
)
from ..flux_core.train.distribution_matching import (
    MatchingData,
    MatchingRecipe,
    train_distribution_matching,
)
from ..flux_core.train.flow import FlowRecipe
from ..flux_core.train.guidance_distillation import GuidanceRecipe, train_guidance
from ..flux_core.train.loop import Preview, Recipe, TrainingRun, device
from ..flux_core.train.pairs import PairSet
from ..flux_core.train.reflow import ReflowRecipe, fold_guidance, train_reflow
from ..flux_core.weights import load_autoencoder
from .autoencoder import MINI_VAE, new_autoencoder, train_decoder
from .base import MINI, train_base
from .data import LatentSet, write_latents
from .evaluate import FAMILY, Decode, Sampling, make_preview
from .export import export
from .folder import Folder, read_encoders, read_transformer
from .front_distillation import FrontDistillationRecipe, train_front_distillation
from .image_data import EdgeRecipe, EdgeScenes, HoleRecipe, HoleScenes
from .kontext import EditScenes, KontextRecipe
from .pairs import PairRecipe, write_pairs
from .pca import decode_linear, linear_code
from .seed_conditioning import (
    SeedConditioningRecipe,
    fully_specified_caption,
    train_seed_conditioning,
    underspecified_caption,
)
from .text_encoders import random_caption, train_text

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {
    "base": ("text", "data"),
    "autoencoder": ("data",),
    "guidance": ("base",),
    "kontext": ("guidance",),
    "canny": ("guidance",),
    "fill": ("guidance",),
    "pairs": ("base",),
    "reflow": ("guidance", "pairs"),
    "schnell": ("reflow",),
    "reading": ("schnell",),
    "decide": ("reading",),
    "export": ("decide", "autoencoder"),
}
"""Stages whose files a stage reads, besides those that these need."""
ONLY_NAMED = ("kontext", "canny", "fill")
"""Stages that run when they are named, and whose models `export` writes if they are there."""
STEPS = {
    "text": 2_000,
    "base": 40_000,
    "autoencoder": 3_000,
    "guidance": 3_000,
    "kontext": 10_000,
    "canny": 3_000,
    "fill": 5_000,
    "reflow": 4_000,
    "schnell": 4_000,
    "reading": 250,
    "decide": 2_000,
}
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run.py train`."""
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"which of {', '.join(RUN)}; all but {', '.join(ONLY_NAMED)} unless given",
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "data" / "training", help="folder of checkpoints")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where export writes")
    parser.add_argument("--seed", type=int, default=0, help="seed of images, weights and noise")
    parser.add_argument("--pictures", type=int, default=96_000, help="images in the file of latents")
    parser.add_argument("--pairs", type=int, default=16_384, help="pairs of noise and latent for reflow")
    for stage, steps in STEPS.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps, help=f"steps of the stage {stage}")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="batch size of the transformers")
    parser.add_argument("--lr", type=float, help="peak learning rate; default: each stage's own")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the losses (needs a C++ compiler)"
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="bfloat16 matrix multiplications (faster where the processor supports them)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the requested stages in order; returns 0, or 1 with a message when one could not run."""
    parser = argparse.ArgumentParser(
        prog="run.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages if stage not in RUN]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; choose among {', '.join(RUN)}")
    usual = [stage for stage in RUN if stage not in ONLY_NAMED]
    for stage, run in RUN.items():
        if stage in (args.stages or usual):
            sys.stderr.write(f"stage {stage}\n")
            try:
                check_needs(stage, Folder(args.dir))
                run(Folder(args.dir), args)
            except (OSError, ValueError) as error:
                sys.stderr.write(f"the stage {stage} could not run: {error}\n")
                return 1
    return 0


def check_needs(stage: str, folder: Folder) -> None:
    """Raise ValueError when an earlier stage, whose files this one reads, is missing."""
    for earlier in NEEDS.get(stage, ()):
        check_needs(earlier, folder)
        if not folder.file(earlier).exists():
            raise ValueError(f"{folder.file(earlier)} does not exist; run the stage {earlier} first")


def recipe_of(kind: type[AnyRecipe], args: argparse.Namespace) -> AnyRecipe:
    """A stage's settings with those of the command line."""
    recipe = replace(kind(), batch=args.batch, compiled=args.compile, bf16=args.bf16)
    return recipe if args.lr is None else replace(recipe, lr=args.lr)


def read_initial_autoencoder(folder: Folder) -> AutoEncoder:
    """The autoencoder of the stage data, its decoder untrained."""
    autoencoder = AutoEncoder(MINI_VAE)
    autoencoder.load_state_dict(load_file(folder.encoder))
    return autoencoder


def preview_of(folder: Folder, spec: FluxSpec, encoders: TextEncoders, sampling: Sampling) -> Preview:
    """A stage's preview, decoded by the trained autoencoder if there is one, else by the linear code."""
    decode: Decode
    if folder.file("autoencoder").exists():
        decode = load_autoencoder(folder.file("autoencoder"), dtype=torch.float32).decode
    else:
        code = linear_code(read_initial_autoencoder(folder))
        decode = partial(decode_linear, code=code)

    return make_preview(spec, encoders, decode, sampling)


def run_of(stage: str, args: argparse.Namespace, preview: Preview | None = None) -> TrainingRun:
    """A stage's output, steps and seed."""
    return TrainingRun(
        Folder(args.dir).file(stage), getattr(args, f"{stage}_steps"), seed=args.seed, preview=preview
    )


def run_text(folder: Folder, args: argparse.Namespace) -> None:
    train_text(folder.file("text").parent, args.text_steps, seed=args.seed)


def run_data(folder: Folder, args: argparse.Namespace) -> None:
    autoencoder = new_autoencoder(args.seed)
    write_safetensors(folder.encoder, dict(autoencoder.state_dict()), {})
    write_latents(folder.file("data"), autoencoder, args.pictures, seed=args.seed + 1)


def run_base(folder: Folder, args: argparse.Namespace) -> None:
    encoders = read_encoders(folder)
    preview = preview_of(folder, MINI, encoders, Sampling(8, cfg_scale=3.5))
    recipe = recipe_of(FlowRecipe, args)
    train_base(run_of("base", args, preview), folder.file("data"), encoders, recipe)


def run_autoencoder(folder: Folder, args: argparse.Namespace) -> None:
    train_decoder(read_initial_autoencoder(folder), run_of("autoencoder", args))


def run_guidance(folder: Folder, args: argparse.Namespace) -> None:
    encoders = read_encoders(folder)
    teacher = read_transformer(folder.file("base"))
    spec = replace(teacher.spec, guidance_embed=True)
    preview = preview_of(folder, spec, encoders, Sampling(8, guidance=3.5))
    data, recipe = LatentSet(folder.file("data")), recipe_of(GuidanceRecipe, args)
    train_guidance(run_of("guidance", args, preview), data, encoders, teacher, recipe)


def run_kontext(folder: Folder, args: argparse.Namespace) -> None:
    data, recipe = EditScenes(read_initial_autoencoder(folder)), recipe_of(KontextRecipe, args)
    model = read_transformer(folder.file("guidance")).to(device())
    train_conditional(run_of("kontext", args), data, read_encoders(folder), model, recipe)


def run_canny(folder: Folder, args: argparse.Namespace) -> None:
    data = EdgeScenes(read_initial_autoencoder(folder))
    _train_with_channels("canny", data, CONTROL_CHANNELS, recipe_of(EdgeRecipe, args), folder, args)


def run_fill(folder: Folder, args: argparse.Namespace) -> None:
    data = HoleScenes(read_initial_autoencoder(folder))
    _train_with_channels("fill", data, FILL_CHANNELS, recipe_of(HoleRecipe, args), folder, args)


def _train_with_channels(
    stage: str,
    data: ImageData,
    in_channels: int,
    recipe: ConditionalRecipe,
    folder: Folder,
    args: argparse.Namespace,
) -> None:
    """Fine-tune mini-dev, widened to tokens of `in_channels` values."""
    model = with_input_channels(read_transformer(folder.file("guidance")), in_channels).to(device())
    train_conditional(run_of(stage, args), data, read_encoders(folder), model, recipe)


def run_pairs(folder: Folder, args: argparse.Namespace) -> None:
    teacher = read_transformer(folder.file("base")).to(device())
    recipe = PairRecipe(seed=args.seed, bf16=args.bf16)
    write_pairs(folder.file("pairs").parent, teacher, read_encoders(folder), args.pairs, recipe)


def run_reflow(folder: Folder, args: argparse.Namespace) -> None:
    encoders = read_encoders(folder)
    student = fold_guidance(read_transformer(folder.file("guidance")), MatchingRecipe.guidance)
    preview = preview_of(folder, student.spec, encoders, Sampling(4, shift="none"))
    pairs, recipe = PairSet(folder.file("pairs").parent), recipe_of(ReflowRecipe, args)
    train_reflow(run_of("reflow", args, preview), pairs, encoders, student, recipe)


def run_schnell(folder: Folder, args: argparse.Namespace) -> None:
    encoders = read_encoders(folder)
    student, teacher = (read_transformer(folder.file(stage)) for stage in ("reflow", "guidance"))
    preview = preview_of(folder, student.spec, encoders, Sampling(1, shift="none"))
    data = MatchingData(PairSet(folder.file("pairs").parent), lambda rng: random_caption(rng)[1])
    recipe = recipe_of(MatchingRecipe, args)
    train_distribution_matching(run_of("schnell", args, preview), data, encoders, student, teacher, recipe)


def run_reading(folder: Folder, args: argparse.Namespace) -> None:
    student = read_transformer(folder.file("schnell"))
    train_front_distillation(
        run_of("reading", args), read_encoders(folder), student, recipe_of(FrontDistillationRecipe, args)
    )


def run_decide(folder: Folder, args: argparse.Namespace) -> None:
    encoders = read_encoders(folder)
    student, teacher = (read_transformer(folder.file(stage)) for stage in ("reading", "schnell"))
    own = PairRecipe(
        sampling=FAMILY["schnell"],
        draw_caption=underspecified_caption,
        teacher_prompt=fully_specified_caption,
        seed=args.seed + 1,
        bf16=args.bf16,
    )
    pairs = folder.path / "decided"
    write_pairs(pairs, teacher.to(device()), encoders, args.pairs, own)
    preview = preview_of(folder, student.spec, encoders, Sampling(1, shift="none"))
    recipe = recipe_of(SeedConditioningRecipe, args)
    train_seed_conditioning(run_of("decide", args, preview), PairSet(pairs), encoders, student, recipe)


def run_export(folder: Folder, args: argparse.Namespace) -> None:
    export(folder, args.models)


RUN = {
    "text": run_text,
    "data": run_data,
    "base": run_base,
    "autoencoder": run_autoencoder,
    "guidance": run_guidance,
    "kontext": run_kontext,
    "canny": run_canny,
    "fill": run_fill,
    "pairs": run_pairs,
    "reflow": run_reflow,
    "schnell": run_schnell,
    "reading": run_reading,
    "decide": run_decide,
    "export": run_export,
}
