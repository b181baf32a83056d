"""The weight files in a folder in diffusers' or transformers' layout: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .file_names import INDICES, SAFETENSORS, check_encodable, has_ending, is_hidden, refusal
from .messages import quoted

MAX_INDEX = 1 << 24
"""Bytes of an index that are read; FLUX.1's has 0.1 MB."""


def weight_files(folder: Path, subfolders: Sequence[str], label: str) -> list[Path]:
    """The weight files in the first of the `subfolders` that exists, else those in the folder itself.

    Raises ValueError for a folder without any, called one without `label`, and for an index that is broken or
    names files elsewhere; FileNotFoundError for a missing shard. Hidden files and links whose target is
    missing are left out.
    """
    check_encodable(folder)
    folder = next((folder / name for name in subfolders if (folder / name).is_dir()), folder)
    if indices := _files(folder, INDICES):
        return _shards(indices[0])
    found = _files(folder, SAFETENSORS)
    if not found:
        raise ValueError(
            f"{folder} holds no .safetensors file of a {label}; choose a model file, or a folder in "
            "diffusers' layout"
        )
    return found[:1]


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files in the folder with one of the endings, those of a variant last."""
    visible = (path for path in folder.iterdir() if not is_hidden(path.name) and refusal(path.name) is None)
    return sorted((p for p in visible if has_ending(p, endings) and p.is_file()), key=_variants_last)


def _variants_last(path: Path) -> tuple[int, str]:
    """A sort key that puts a name without a variant (fp16, ...) before those with one."""
    return path.name.count("."), path.name


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, all beside it."""
    names: Iterable[str]
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError("larger than 16 MB")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if (
                Path(name).name != name
                or refusal(name)
                or not name.isprintable()
                or not has_ending(name, SAFETENSORS)
            ):
                raise ValueError(f"it names {quoted(name)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of shards ({error}); download it again") from error
    paths = [_shard(index.parent / name) for name in names]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{missing.name}, which {index.name} lists, does not exist; download the whole folder again"
        )
    if not paths:
        raise ValueError(f"{index.name} is not an index of shards (it lists none); download it again")
    return paths


def _shard(path: Path) -> Path:
    """The path, with the other ending of safetensors files if only that file exists."""
    renamed = (path.with_suffix(ending) for ending in SAFETENSORS)
    return path if path.is_file() else next((other for other in renamed if other.is_file()), path)
