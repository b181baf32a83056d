"""Outputs beside the references': every file format against diffusers and transformers.

    python3 run.py bench fidelity [--quick] [--threads 1] [--json FILE]

A small FLUX.1 with random weights (dev in full; of schnell, Fill and Canny what differs) is written in every
supported format, loaded by flux_core and compared with diffusers' and transformers' models of the same
weights, for the same tokens and noise: a minute on one core. The weights of a quantized file are dequantized
without flux_core: GGUF's by the gguf package, the others' by benchmarks/reference/quantized.py. A row for
each model in each format:

  dtype            what flux_core computes in; the reference always computes in fp32
  relative error   the largest difference over the reference's largest magnitude
  the reference's  the same error of the reference when it computes in that dtype too, "-" for fp32
  dequantized      the largest difference to torch's layers with the dequantized weights; 0 is equal
  PSNR             of the final image in dB: 512 tokens of prompt (schnell: 256), 4 steps, 64 x 64 pixels

The last line has the extremes of the exact formats: float32 values in the file, computed in float32.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ..flux_core.pipeline import Models
from ..flux_core.quant.formats import DTYPE_NAMES
from ..flux_core.weights import load_autoencoder, load_text_encoders, load_transformer
from .fidelity_components import COMPONENTS, IMAGE, velocity
from .image_metrics import psnr
from .reference.file_formats import EXACT, FORMATS, QUANTIZED, Written
from .reference.models import relative_error
from .reference.small_pipeline import VARIANTS, Small, save_tokenizers, small
from .report import add_json, parser_of, positive, write_report

NEEDS = "test"  # the part of run.py's environment that has diffusers
QUICK = ("BFL safetensors", "diffusers folder, shards", "all-in-one", "bf16", "fp8 e5m2", "GGUF Q4_K")
OWN_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8 e4m3fn": torch.bfloat16,
    "NF4": torch.bfloat16,
    "GGUF Q4_K": torch.bfloat16,
}
"""Formats that are also computed in the dtype that is their default."""

COMPARED = {
    "schnell": ("transformer", "whole image"),
    "Fill": ("transformer",),
    "Canny": ("transformer",),
}
"""Components of the other variants that differ from dev's; Fill and Canny would need an input image."""

HEAD = ("component", "model", "format", "dtype", "relative error", "the reference's", "dequantized", "PSNR")
WIDTHS = (13, 7, 24, 5, 14, 15, 11, 6)


@dataclass(frozen=True)
class Row:
    """A line of the table; None where a column does not apply."""

    component: str
    model: str
    format: str
    dtype: str
    relative_error: float
    reference_error: float | None
    dequantized: float | None
    psnr: float | None
    exact: bool

    def line(self) -> str:
        texts = (self.component, self.model, self.format, self.dtype)
        errors = (self.relative_error, self.reference_error, self.dequantized)
        formatted = ("-" if e is None else "0" if e == 0 else f"{e:.1e}" for e in errors)
        return columns(*texts, *formatted, "-" if self.psnr is None else f"{self.psnr:.1f}")


def columns(*cells: str) -> str:
    """The first four cells aligned to the left, the others to the right."""
    left = [f"{cell:{width}}" for cell, width in zip(cells[:4], WIDTHS[:4], strict=True)]
    right = [f"{cell:>{width}}" for cell, width in zip(cells[4:], WIDTHS[4:], strict=True)]
    return "  ".join(left + right)


def main(argv: list[str]) -> int:
    """Compare in every format, print a line for each; the exit code, 0."""
    parser = parser_of("fidelity", __doc__)
    parser.add_argument("--quick", action="store_true", help="dev in a few formats: does it run at all?")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it warns about 16-bit dtypes
    disable_progress_bar()
    print(columns(*HEAD))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for row in compare(Path(folder), arguments.quick):
            rows.append(row)
            print(row.line(), flush=True)
    headline = extremes(rows)
    write_report(arguments, "fidelity", {"rows": [asdict(row) for row in rows], "headline": headline})
    print("worst_relative_error {worst_relative_error:.1e} lowest_psnr {lowest_psnr:.1f}".format(**headline))
    return 0


def extremes(rows: Sequence[Row]) -> dict[str, float]:
    """The worst of the exact formats; NaN where one of them is NaN."""
    exact = [row for row in rows if row.exact]
    errors = torch.tensor([row.relative_error for row in exact], dtype=torch.float64)
    images = torch.tensor([row.psnr for row in exact if row.psnr is not None], dtype=torch.float64)
    return {"worst_relative_error": float(errors.max()), "lowest_psnr": float(images.min())}


def compare(folder: Path, quick: bool) -> Iterator[Row]:
    """The rows, one after the other."""
    tokenizers = save_tokenizers(folder)
    for variant in ["dev"] if quick else VARIANTS:
        original = small(variant)
        names = QUICK if quick else FORMATS if variant == "dev" else EXACT
        for name in names:
            place = folder / variant / name.replace(" ", "_")
            place.mkdir(parents=True)
            written = FORMATS[name](original, place)
            plain = original.with_weights(written.weights)
            for dtype in (torch.float32, OWN_DTYPES.get(name)):
                if dtype is not None:
                    ours = load(written, tokenizers, dtype)
                    yield from rows_of(variant, name, written, ours, plain, dtype)
            shutil.rmtree(place, ignore_errors=True)


def load(written: Written, tokenizers: list[Path], dtype: torch.dtype) -> Models:
    """The four models by flux_core's loaders, T5 with the transformer's number of tokens."""
    paths = written.paths
    transformer = load_transformer(paths["transformer"], dtype)
    autoencoder = load_autoencoder(paths["autoencoder"], dtype)
    texts = load_text_encoders(paths["clip"], paths["t5"], dtype, tokenizer_folders=tokenizers)
    texts.txt_length = transformer.spec.txt_length
    return Models(texts, transformer, autoencoder)


def rows_of(
    variant: str, name: str, written: Written, ours: Models, plain: Small, dtype: torch.dtype
) -> Iterator[Row]:
    """A row for each model that is stored in the format, and one for the image that all generate together.

    `plain` has torch's own layers with the dequantized weights.
    """
    references = plain.references()
    rounded = references if dtype == torch.float32 else references.computing_in(dtype)
    for title, component in COMPONENTS.items():
        if component.part not in (*written.parts, IMAGE) or title not in COMPARED.get(variant, COMPONENTS):
            continue
        answer, expected = component.ours(ours).float(), component.theirs(references, ours)
        same = expected if rounded is references else component.theirs(rounded, ours).float()
        quantized = name in QUANTIZED and component.part != IMAGE
        yield Row(
            component=title,
            model=variant,
            format=name,
            dtype=DTYPE_NAMES[dtype],
            relative_error=relative_error(answer, expected),
            reference_error=None if rounded is references else relative_error(same, expected),
            dequantized=dequantized_error(title, answer, same, plain, dtype) if quantized else None,
            psnr=psnr(answer, expected) if component.part == IMAGE else None,
            exact=name in EXACT and dtype == torch.float32,
        )


def dequantized_error(title: str, answer: Tensor, same: Tensor, plain: Small, dtype: torch.dtype) -> float:
    """Largest difference to torch's layers with dequantized weights (the reference's for T5 and CLIP)."""
    if title == "transformer":
        same = velocity(copy.deepcopy(plain.transformer).to(dtype)).float()
    return float((answer - same).abs().max())
