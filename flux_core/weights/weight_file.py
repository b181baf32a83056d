"""One model file of any format, or the shards of one, as mapped tensors by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..quant.formats import QuantizedWeight
from .gguf_file import is_gguf, read_gguf
from .safetensors_file import TRANSFORMER_PREFIXES, check_path, read_safetensors
from .source_files import FileState

if TYPE_CHECKING:
    from gguf import GGUFReader

Weight = Tensor | QuantizedWeight
"""A tensor of a file, or a quantized weight made of several."""


class Part(Enum):
    """A part of a pipeline that a folder or an all-in-one file may hold; MODEL is whatever is there."""

    TRANSFORMER = "transformer"
    VAE = "vae"
    CLIP = "clip"
    T5 = "t5"
    MODEL = "model"

    @property
    def label(self) -> str:
        """The part's name in a sentence, without an article."""
        return _LABELS.get(self, self.value)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What its tensors' names start with in all-in-one files."""
        return _PREFIXES.get(self, ())

    @property
    def folders(self) -> tuple[str, ...]:
        """Its folder in diffusers' layout of a pipeline."""
        return (_FOLDERS[self],)


_LABELS = {Part.VAE: "VAE", Part.CLIP: "CLIP text encoder", Part.T5: "T5 text encoder"}
_PREFIXES = {
    Part.TRANSFORMER: TRANSFORMER_PREFIXES,
    Part.VAE: ("vae.", "first_stage_model."),
    Part.CLIP: ("text_encoders.clip_l.transformer.",),
    Part.T5: ("text_encoders.t5xxl.transformer.",),
}
_FOLDERS = {
    Part.TRANSFORMER: "transformer",
    Part.VAE: "vae",
    Part.CLIP: "text_encoder",
    Part.T5: "text_encoder_2",
    Part.MODEL: "transformer",
}


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file, or of all shards of a model, without `prefix`; and the metadata as text.

    `format` is "safetensors" or "GGUF", `size` the bytes on disk of all `paths`, `gguf` the open reader of a
    GGUF file, `folder` the folder that was chosen in place of a file, `states` the files
    as they were when they were opened.
    """

    paths: tuple[Path, ...]
    format: str
    size: int
    tensors: dict[str, Weight]
    metadata: dict[str, str]
    prefix: str = ""
    gguf: GGUFReader | None = None
    folder: Path | None = None
    states: tuple[FileState, ...] = ()

    @property
    def name(self) -> str:
        """The file's name in sentences, with the folder that was chosen."""
        first = self.paths[0]
        if self.folder is not None:
            return first.relative_to(self.folder.parent).as_posix()
        return first.name if len(self.paths) == 1 else f"{first.parent.name}/{first.name}"

    def part(self, part: Part) -> WeightFile:
        """Only the tensors under the first of the part's prefixes that any name has; all where none has."""
        prefix = next((p for p in part.prefixes if any(name.startswith(p) for name in self.tensors)), "")
        if not prefix:
            return self
        inside = {n[len(prefix) :]: tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}
        return replace(self, tensors=inside, prefix=prefix)


def open_file(path: Path) -> WeightFile:
    """A safetensors or GGUF file, detected from its first bytes; tensors are mapped, not read.

    Raises FileNotFoundError for a missing file, and ValueError for a pickle and for a file that is empty, cut
    short, damaged or of another format.
    """
    path = check_path(path)
    state = FileState.of(path)
    if is_gguf(path):
        tensors, metadata, reader = read_gguf(path)
        file = WeightFile((path,), "GGUF", state.size, dict(tensors), metadata, gguf=reader)
    else:
        plain, metadata = read_safetensors(path)
        file = WeightFile((path,), "safetensors", state.size, dict(plain), metadata)
    if not state.is_current():
        raise ValueError(f"{path.name} is being written; wait until it is complete, and load it again")
    return replace(file, states=(state,))


def merge(shards: list[WeightFile]) -> WeightFile:
    """The shards of one model as one file. Raises ValueError when two have a tensor of the same name."""
    whole = shards[0]
    for shard in shards[1:]:
        repeated = next((name for name in shard.tensors if name in whole.tensors), None)
        if repeated is not None:
            raise ValueError(
                f"{shard.name} holds {repeated}, as another shard does; "
                "remove the file that does not belong there"
            )
        whole = replace(
            whole,
            paths=(*whole.paths, *shard.paths),
            size=whole.size + shard.size,
            tensors={**whole.tensors, **shard.tensors},
            metadata={**shard.metadata, **whole.metadata},
            states=(*whole.states, *shard.states),
        )
    return whole
