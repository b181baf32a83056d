"""Names of files: the endings of model files, which names are listed, and which are refused.

A name in a workflow or a request is relative to a folder. It is checked before symbolic links are followed:
links were made by the folders' owner, the name may come from anyone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .messages import quoted

SAFETENSORS = (".safetensors", ".sft")
"""Endings of safetensors files; FLUX.1's first release had the second."""
GGUF = (".gguf",)
MODEL_FILES = (*SAFETENSORS, *GGUF)
PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".pickle")
INDICES = tuple(f"{ending}.index.json" for ending in SAFETENSORS)
"""Endings of the lists of a model's shards."""

MAX_NAME_BYTES = 255
"""Bytes of one name in the usual file systems."""

OUTSIDE = "must stay in its folder"
"""What `refusal` returns for a name that is absolute, has a drive, or leaves its folder."""

_SEPARATORS = re.compile(r"[/\\]")
_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that would break a line of a message or of a terminal."""


def has_ending(name: str | Path, endings: tuple[str, ...]) -> bool:
    """Whether a file's name has one of the endings, in capitals or not.

    >>> has_ending("ae.SFT", SAFETENSORS)
    True
    """
    return os.fspath(name).lower().endswith(endings)


def is_encodable(name: str) -> bool:
    """Whether a name is valid Unicode; a file's is not if its bytes are not UTF-8.

    safetensors and torch cannot open such a file, and no message can be written with its name.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: .cache, and the ._NAME and __MACOSX that macOS adds to copies."""
    return name.startswith(".") or name == "__MACOSX"


def refusal(name: Any) -> str | None:
    """Why a name is refused, as in "{name} {refusal}", or None for a relative name that stays in its folder.

    Both systems' separators count, so that a name is refused everywhere or nowhere.

    >>> refusal("flux/dev.safetensors")
    >>> refusal("..\\\\x.safetensors")
    'must stay in its folder'
    """
    if not isinstance(name, str):
        return "must be text"
    if not is_encodable(name):
        return "must be valid Unicode, which the bytes of its file are not; rename the file"
    if _CONTROL.search(name):
        return "must not contain control characters or line breaks"
    parts = _SEPARATORS.split(name)
    if not name or not parts[0] or _DRIVE.match(name) or any(part.rstrip(" ") == ".." for part in parts):
        return OUTSIDE
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"must have at most {MAX_NAME_BYTES} bytes"
    return None


def check_encodable(path: str | Path) -> None:
    """Raise ValueError for a path whose bytes are not UTF-8."""
    if not is_encodable(os.fspath(path)):
        raise ValueError(f"the name {quoted(os.fspath(path))} is not valid Unicode (UTF-8); rename the file")


def walk_visible(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of its folders, names of its files) of a folder and all below it, sorted.

    Links are followed, each folder is visited once. Hidden names, names that are refused and links whose
    target is missing are left out, and so are folders that cannot be read. The caller may shorten the list of
    folders, as with os.walk.
    """
    visited: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        target = os.path.realpath(place)
        if target in visited:
            folders.clear()
            continue
        visited.add(target)
        folders[:] = sorted(name for name in folders if _is_listed(name))
        found = (name for name in files if _is_listed(name) and os.path.isfile(os.path.join(place, name)))
        yield Path(place), folders, sorted(found)


def _is_listed(name: str) -> bool:
    return not is_hidden(name) and refusal(name) is None
