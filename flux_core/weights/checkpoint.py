"""A model's file or folder, of whatever format, as one dictionary of tensors that are still where they were.

What a file is, is told by its content. A folder is diffusers' or transformers' layout: one file, or several
with an index; or a whole pipeline, of which the part that is asked for is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..quant.formats import QuantizedWeight
from .gguf_file import is_gguf, read_gguf
from .safetensors_file import TRANSFORMER_PREFIXES, checked, read_state_dict, safetensors_metadata

Weight = Tensor | QuantizedWeight
"""A tensor as a file has it."""


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: its name in sentences, prefixes in all-in-one files, folders in diffusers."""

    name: str
    prefixes: tuple[str, ...]
    folders: tuple[str, ...]


TRANSFORMER_PART = Part("transformer", TRANSFORMER_PREFIXES, ("transformer",))
VAE_PART = Part("VAE", ("vae.", "first_stage_model."), ("vae",))
CLIP_PART = Part("CLIP text encoder", ("text_encoders.clip_l.transformer.",), ("text_encoder",))
T5_PART = Part("T5 text encoder", ("text_encoders.t5xxl.transformer.",), ("text_encoder_2",))
ANY_PART = Part("model", (), ("transformer",))


@dataclass(frozen=True)
class WeightFile:
    """What a file or folder holds: tensors by name, without `prefix`, and the metadata as text.

    `format` is "safetensors" or "GGUF", `size` the bytes on the disk of all `paths`.
    """

    paths: tuple[Path, ...]
    format: str
    size: int
    tensors: dict[str, Weight]
    metadata: dict[str, str]
    prefix: str = ""

    @property
    def name(self) -> str:
        """How sentences call it."""
        first = self.paths[0]
        return first.name if len(self.paths) == 1 else f"{first.parent.name}/{first.name}"


def read_weights(path: str | Path, part: Part = ANY_PART) -> WeightFile:
    """The tensors of a safetensors or GGUF file or of a folder; mapped, not read.

    Where names start with one of the part's prefixes, only these are given, and without it. Raises
    FileNotFoundError for what is not there, and ValueError for a pickle, a file that is empty, cut short,
    damaged or of another format, and a folder without weights.
    """
    path = Path(path)
    if path.is_dir():
        return _merged(files_of(path, part), part)
    return _read_one(path, part.prefixes)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file or folder as text, empty when it has none. Raises as `read_weights`."""
    return read_weights(path).metadata


def _read_one(path: Path, prefixes: tuple[str, ...]) -> WeightFile:
    path = checked(path)
    size = path.stat().st_size
    if is_gguf(path):
        tensors, metadata = read_gguf(path)
        kind = "GGUF"
    else:
        tensors, metadata, kind = (
            dict[str, Weight](read_state_dict(path, ())),
            safetensors_metadata(path),
            "safetensors",
        )
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tensors)), "")
    ours = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return WeightFile((path,), kind, size, ours, metadata, prefix)


def _merged(paths: list[Path], part: Part) -> WeightFile:
    """The shards of one model as one file. Raises ValueError when two have a tensor of one name."""
    whole = _read_one(paths[0], part.prefixes)
    for path in paths[1:]:
        shard = _read_one(path, part.prefixes)
        twice = next((name for name in shard.tensors if name in whole.tensors), None)
        if twice is not None:
            raise ValueError(f"{path.name} holds {twice} again; remove the file that does not belong there")
        whole = replace(
            whole,
            paths=(*whole.paths, path),
            size=whole.size + shard.size,
            tensors={**whole.tensors, **shard.tensors},
            metadata={**shard.metadata, **whole.metadata},
        )
    return whole


def files_of(folder: Path, part: Part) -> list[Path]:
    """The weight files of a part in diffusers' or transformers' folder, a pipeline's or the part's own.

    Raises ValueError for a folder without any, and for an index that is broken or names files elsewhere;
    FileNotFoundError for a shard that is missing.
    """
    inner = next((folder / name for name in part.folders if (folder / name).is_dir()), None)
    if inner is not None:
        folder = inner
    indices = sorted(folder.glob("*.safetensors.index.json"), key=_plainest)
    if indices:
        return _shards(indices[0])
    found = sorted((p for p in folder.glob("*.safetensors") if p.is_file()), key=_plainest)
    if not found:
        raise ValueError(
            f"{folder} holds no .safetensors file of a {part.name}; choose a model's file, or its folder as "
            "diffusers has it"
        )
    return found[:1]


def _plainest(path: Path) -> tuple[int, str]:
    """Sorts a name without a variant (fp16, ...) before those with one."""
    return path.name.count("."), path.name


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, all beside it."""
    names: Iterable[str]
    try:
        if index.stat().st_size > 1 << 24:
            raise ValueError("more than 16 MB")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of shards ({error}); download it again") from error
    paths = [index.parent / name for name in names]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{missing.name}, which {index.name} lists, does not exist; download the whole folder again"
        )
    if not paths:
        raise ValueError(f"{index.name} is not an index of shards (it lists none); download it again")
    return paths
