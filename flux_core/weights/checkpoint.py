"""A model file or folder that is opened once, for its header, metadata, description and tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..model.spec import FluxSpec
from .assemble import assemble
from .assign import choose_dtype
from .describe import description
from .diffusers import autoencoder_names, transformer_names
from .folders import weight_files
from .kinds import ModelKind, expect, kind_of
from .layouts import check_layout
from .llama_cpp import t5_names
from .shape_errors import blame_file
from .weight_file import Part, Weight, WeightFile, merge, open_file

MAX_BLOCKS = 1000


@dataclass(frozen=True)
class PartWeights:
    """The weights of one part: quantized ones assembled, names as this code spells them.

    Those are BFL's for the transformer and the VAE, transformers' for the text encoders. `kind` is what was
    detected, with the file's own spelling.
    """

    file: WeightFile
    kind: ModelKind
    tensors: dict[str, Weight]

    @property
    def name(self) -> str:
        """The file's name in sentences."""
        return self.file.name

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Number of parameters, quantized ones included."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that a loader computes in when none is given. Raises ValueError as `choose_dtype`."""
        return choose_dtype(self.tensors, self.name)


class Checkpoint:
    """A model file or a folder in diffusers' layout, each of whose files is opened at most once.

    Headers are read when a part is first asked for; tensors stay mapped, and their values are read when used.
    Loaders take a Checkpoint in place of a path:

    >>> checkpoint = Checkpoint.open("flux1-dev.safetensors")  # doctest: +SKIP
    >>> checkpoint.describe()  # doctest: +SKIP
    'FLUX.1 [dev], bf16, 23.80 GB, 11.90 billion parameters'
    >>> model = load_transformer(checkpoint)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[Path, WeightFile] = {}
        self._weights: dict[Part, PartWeights] = {}

    @classmethod
    def open(cls, source: str | Path | Checkpoint) -> Checkpoint:
        """The checkpoint at a path; a Checkpoint is returned unchanged.

        Raises what `open_file` raises; for a folder, `part` does.
        """
        if isinstance(source, Checkpoint):
            return source
        checkpoint = cls(source)
        if not checkpoint.path.is_dir():
            checkpoint._file(checkpoint.path)
        return checkpoint

    def _file(self, path: Path) -> WeightFile:
        if path not in self._files:
            self._files[path] = open_file(path)
        return self._files[path]

    def part(self, part: Part = Part.MODEL) -> WeightFile:
        """A part's tensors as stored, under the file's own names without its prefix.

        Raises what `open_file` raises, and ValueError for a folder without the part's weights, with a broken
        index or with shards that repeat a tensor.
        """
        if not self.path.is_dir():
            return self._file(self.path).part(part)
        paths = weight_files(self.path, part.folders, part.label)
        return replace(merge([self._file(path).part(part) for path in paths]), folder=self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file, or of the folder's transformer, as text."""
        return self.part().metadata

    def weights(self, part: Part) -> PartWeights:
        """A part's weights, ready to be assigned to a module. Raises ValueError for unsupported formats."""
        if part not in self._weights:
            file = self.part(part)
            check_layout(file)
            tensors = assemble(file)
            kind = kind_of(tensors)
            self._weights[part] = PartWeights(file, kind, _with_our_names(tensors, kind, file.name))
        return self._weights[part]

    def transformer_spec(self) -> FluxSpec:
        """The sizes of the transformer, read from the shapes. Raises ValueError for another kind of model."""
        weights = self.weights(Part.TRANSFORMER)
        expect(weights.kind, ModelKind.TRANSFORMER, weights.name)
        with blame_file(weights.name, ModelKind.TRANSFORMER, weights.tensors):
            spec = FluxSpec.from_state_dict(weights.tensors)
            blocks = spec.depth + spec.depth_single
            if blocks > MAX_BLOCKS:  # building them would take minutes
                raise ValueError(f"it has {blocks:,} blocks, FLUX.1 has 57; choose another file")
        return spec

    def describe(self, part: Part = Part.TRANSFORMER) -> str:
        """A line on a part: "FLUX.1 [dev], GGUF Q4_K, 6.81 GB, 11.90 billion parameters".

        The size is that of the files. Only headers are read. Raises as `weights`.
        """
        weights = self.weights(part)
        return description(weights.file, weights.kind, weights.tensors)


Source = str | Path | Checkpoint
"""What a loader loads: a path, or a checkpoint that is already open."""


def _with_our_names(tensors: dict[str, Weight], kind: ModelKind, file: str) -> dict[str, Weight]:
    """The tensors under BFL's or transformers' names; other kinds of model keep theirs."""
    match kind:
        case ModelKind.TRANSFORMER | ModelKind.DIFFUSERS_TRANSFORMER:
            return transformer_names(tensors, file)
        case ModelKind.DIFFUSERS_VAE:
            return autoencoder_names(tensors)
        case ModelKind.LLAMA_CPP_T5:
            return t5_names(tensors)
    return tensors


def read_weights(path: str | Path, part: Part = Part.MODEL) -> WeightFile:
    """A part's tensors as stored in a file or folder; see `Checkpoint.part`."""
    return Checkpoint.open(path).part(part)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file or folder as text, empty when it has none. Raises as `Checkpoint.part`."""
    return Checkpoint.open(path).metadata


def describe(source: Source, part: Part | str = Part.TRANSFORMER) -> str:
    """A line on the model in a file or folder; see `Checkpoint.describe`."""
    return Checkpoint.open(source).describe(Part(part))
