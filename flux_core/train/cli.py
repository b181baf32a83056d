"""`python3 run.py train`: the miniature, from nothing to the files in models/, in stages that each resume.

text      captions            -> T5 and CLIP text encoders          (a minute or two)
latents   pictures            -> the written encoder, and a file of latents
flow      latents and texts   -> the transformer                    (the long one)
decoder   pictures            -> the autoencoder's decoder
evaluate  captions            -> scores by the checker, a sheet of pictures
export    all of these        -> half-precision files under models/
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import preview
from ..vae import to_model_space
from ..weights import load_autoencoder, load_text_encoders, load_transformer
from .autoencoder import draw_batch, new_autoencoder, train_decoder
from .checkpoint import write_safetensors
from .data import write_latents
from .evaluate import evaluate
from .flow import Recipe, train_flow
from .text import train_text

STAGES = ("text", "latents", "flow", "decoder", "evaluate", "export")
NEEDS = {
    "flow": ("text", "latents"),
    "decoder": ("latents",),
    "evaluate": ("text", "flow", "decoder"),
    "export": ("text", "flow", "decoder"),
}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Folder:
    """Where a training keeps its files."""

    path: Path

    @property
    def text(self) -> Path:
        return self.path / "text_encoders"

    @property
    def latents(self) -> Path:
        return self.path / "latents.safetensors"

    @property
    def encoder(self) -> Path:
        return self.path / "encoder.safetensors"

    @property
    def flow(self) -> Path:
        return self.path / "flow.safetensors"

    @property
    def autoencoder(self) -> Path:
        return self.path / "autoencoder.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run.py train`."""
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"which of {', '.join(STAGES)}; all unless given"
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "data" / "training", help="folder of checkpoints")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where export writes")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, weights and noise")
    parser.add_argument("--pictures", type=int, default=32_000, help="pictures in the file of latents")
    parser.add_argument("--text-steps", type=int, default=500, help="steps of the text encoders")
    parser.add_argument("--flow-steps", type=int, default=10_000, help="steps of the transformer")
    parser.add_argument("--decoder-steps", type=int, default=2_000, help="steps of the decoder")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="pictures a step of the transformer")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate of the transformer")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the transformer's loss (needs a C++ compiler)"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 matrix products (quicker where the processor has them)"
    )
    parser.add_argument("--count", type=int, default=200, help="captions that evaluate draws")


def main(argv: list[str] | None = None) -> int:
    """Run the stages asked for, in order; 0 when all ended well, 1 with a sentence when one could not run."""
    parser = argparse.ArgumentParser(
        prog="run.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; choose among {', '.join(STAGES)}")
    for stage in STAGES:
        if stage in (args.stages or STAGES):
            sys.stderr.write(f"stage {stage}\n")
            try:
                check_needs(stage, Folder(args.dir))
                RUN[stage](Folder(args.dir), args)
            except (OSError, ValueError) as error:
                sys.stderr.write(f"the stage {stage} could not run: {error}\n")
                return 1
    return 0


def check_needs(stage: str, folder: Folder) -> None:
    """Raise ValueError when an earlier stage, whose files this one reads, was not run."""
    made = {
        "text": text_files(folder.text)[0],
        "latents": folder.latents,
        "flow": folder.flow,
        "decoder": folder.autoencoder,
    }
    for earlier in NEEDS.get(stage, ()):
        if not made[earlier].exists():
            raise ValueError(f"{made[earlier]} does not exist; run the stage {earlier} first")


def run_text(folder: Folder, args: argparse.Namespace) -> None:
    train_text(folder.text, args.text_steps, seed=args.seed)


def run_latents(folder: Folder, args: argparse.Namespace) -> None:
    autoencoder = new_autoencoder(args.seed)
    write_safetensors(folder.encoder, dict(autoencoder.state_dict()), {})
    write_latents(folder.latents, autoencoder, args.pictures, seed=args.seed + 1)


def run_flow(folder: Folder, args: argparse.Namespace) -> None:
    recipe = replace(Recipe(), batch=args.batch, lr=args.lr)
    encoders = load_text_encoders(*text_files(folder.text), dtype=torch.float32)
    train_flow(
        folder.flow,
        folder.latents,
        encoders,
        args.flow_steps,
        seed=args.seed,
        recipe=recipe,
        compiled=args.compile,
        bf16=args.bf16,
    )


def run_decoder(folder: Folder, args: argparse.Namespace) -> None:
    autoencoder = new_autoencoder(args.seed)
    autoencoder.load_state_dict(load_file(folder.encoder))
    train_decoder(autoencoder, folder.autoencoder, args.decoder_steps, seed=args.seed)


def run_evaluate(folder: Folder, args: argparse.Namespace) -> None:
    """Scores on standard output and in scores.json, and the first 64 pictures in scores.png.

    Of captions that tell everything ("full") and of those that tell shape and colour alone ("short").
    """
    transformer = load_transformer(folder.flow, dtype=torch.float32)
    encoders = load_text_encoders(*text_files(folder.text), dtype=torch.float32)
    autoencoder = load_autoencoder(folder.autoencoder, dtype=torch.float32)
    models = transformer, encoders, autoencoder.decode
    full, pictures = evaluate(*models, args.count)
    short, _ = evaluate(*models, args.count, keep=0.0)
    scores = {"full": full, "short": short}
    (folder.path / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    rows = [np.concatenate(pictures[i : i + 8], axis=1) for i in range(0, min(len(pictures), 64) // 8 * 8, 8)]
    if rows:
        Image.fromarray(np.concatenate(rows)).save(folder.path / "scores.png")
    for kind, shares in scores.items():
        told = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
        sys.stdout.write(f"{kind}: {told}\n")


def run_export(folder: Folder, args: argparse.Namespace) -> None:
    """The files of models/, in float16, with the metadata that loaders need."""
    title = {"modelspec.author": "Rectiflux", "modelspec.license": "Apache-2.0"}
    sources = {
        folder.flow: ("diffusion_models/rectiflux-mini.safetensors", "Rectiflux miniature"),
        folder.autoencoder: ("vae/rectiflux-mini-vae.safetensors", "Rectiflux miniature autoencoder"),
        folder.text / "rectiflux-mini-t5.safetensors": (
            "text_encoders/rectiflux-mini-t5.safetensors",
            "Rectiflux miniature T5",
        ),
        folder.text / "rectiflux-mini-clip.safetensors": (
            "text_encoders/rectiflux-mini-clip.safetensors",
            "Rectiflux miniature CLIP",
        ),
    }
    previews = preview.to_metadata(fit_preview(folder))
    for source, (target, name) in sources.items():
        tensors, metadata = read(source)
        metadata |= previews if source == folder.flow else {}
        half = {key: value.half() for key, value in tensors.items()}
        write_safetensors(args.models / target, half, metadata | title | {"modelspec.title": name})
    for name in ("rectiflux-mini-t5", "rectiflux-mini-clip"):
        text = (folder.text / f"{name}.tokenizer.json").read_text(encoding="utf-8")
        (args.models / "text_encoders" / f"{name}.tokenizer.json").write_text(text, encoding="utf-8")


def fit_preview(folder: Folder) -> preview.Factors:
    """The linear map from latents to small pictures, which the transformer's file carries."""
    images = draw_batch(64, random.Random(0))
    latents = to_model_space(load_autoencoder(folder.autoencoder, dtype=torch.float32).encode(images))
    return preview.fit(latents, images)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a training's file."""
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def text_files(folder: Path) -> tuple[Path, Path]:
    """(CLIP's file, T5's file)."""
    return folder / "rectiflux-mini-clip.safetensors", folder / "rectiflux-mini-t5.safetensors"


RUN = {
    "text": run_text,
    "latents": run_latents,
    "flow": run_flow,
    "decoder": run_decoder,
    "evaluate": run_evaluate,
    "export": run_export,
}
