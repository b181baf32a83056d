"""Model files in the hosts' folders: the names in a loader's list, and the path of such a name.

A list has safetensors and GGUF files, and folders in the layout of diffusers or transformers, each of which
is one model. The host gives the folders to search, the user's own first. What is listed can be resolved, and
a name from a workflow that was saved elsewhere is resolved as far as it names the same file: with the other
system's separators, or with accents in the other Unicode form.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..flux_core.weights.file_names import (
    INDICES,
    MODEL_FILES,
    PICKLES,
    SAFETENSORS,
    has_ending,
    is_encodable,
    is_hidden,
    refusal,
    walk_visible,
)
from ..flux_core.weights.messages import one_line, quoted

PACK_MODELS = Path(__file__).resolve().parent.parent / "models"
"""The miniature's files, which come with the pack and are listed in every host."""

RENAMED = {"rectiflux-mini.safetensors": "rectiflux-mini-pro.safetensors"}
"""Files that earlier versions shipped, and what replaced them: saved workflows keep loading."""

FILES_ONLY = {"loras": SAFETENSORS}
"""Kinds of models that are never folders, with the endings of their files."""

ALSO_IN = {"checkpoints": ("diffusion_models",)}
"""Kinds of models that are listed from another kind's folder too."""

OLD_FOLDERS = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}
"""Earlier names of ComfyUI's folders, which it still searches before those of today."""

MAX_SUGGESTIONS = 5
"""Names that an error about a missing file lists."""


def folders_for(folder: str) -> tuple[str, ...]:
    """Names of the folders below models/ that hold models of one kind."""
    return (folder, *ALSO_IN.get(folder, ()))


def folders_below(models: Path, name: str) -> list[Path]:
    """ComfyUI's folders of one kind below a models folder, in the order in which it searches them."""
    return [models / folder for folder in (*OLD_FOLDERS.get(name, ()), name)]


def names_in(roots: Sequence[Path], folder: str) -> list[Path]:
    """Relative paths of all models of one kind below the roots, each once, in the order of the roots."""
    found = [path.relative_to(root) for root in _usable(roots) for path in sorted(_entries(root, folder))]
    return list(dict.fromkeys(found))


def path_of(roots: Sequence[Path], folder: str, name: Any) -> Path:
    """The file or folder of that name.

    Raises FileNotFoundError, PermissionError for one that cannot be read, and ValueError for a name that can
    be no model's, such as ../x or a number.
    """
    _check_name(name)
    roots = _usable(roots)
    for path in _candidates(roots, folder, name):
        is_file = os.path.isfile(path)
        if is_file or (folder not in FILES_ONLY and path not in roots and is_model_folder(path)):
            if is_file and not os.access(path, os.R_OK):
                raise PermissionError(f"{quoted(name)} cannot be read; change its permissions")
            return path
    raise FileNotFoundError(
        f"there is no {one_line(name)} in models/{folder}; put it there, or choose another file"
    )


def file_state(path: Path) -> str:
    """Names, sizes and times of a model's files, its tokenizer included, which change when they do."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".tokenizer.json")]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return repr([(name, status.st_size, status.st_mtime_ns) for name, status in states])


def path_error(roots: Sequence[Path], folder: str, name: Any) -> str | None:
    """What is wrong with a model's name, in half a sentence, or None: for VALIDATE_INPUTS."""
    if name is None:
        return None  # the name comes from another node, while the prompt runs
    try:
        path = path_of(roots, folder, name)
    except FileNotFoundError:
        if has_ending(name, PICKLES):
            return _about_pickle(name)
        names = [one_line(path.as_posix(), 80) for path in names_in(roots, folder)]
        shown, hidden = names[:MAX_SUGGESTIONS], len(names) - MAX_SUGGESTIONS
        more = f" and {hidden} more" if hidden > 0 else ""
        return f"{quoted(name)} is not in its list, which has {', '.join(shown) or 'none'}{more}"
    except (ValueError, OSError) as error:
        return str(error)
    return _about_pickle(name) if path.is_file() and has_ending(path, PICKLES) else None


def prefer(names: list[str], word: str) -> str | None:
    """The first of the names that contains `word`, as a default; else the first."""
    return next((name for name in names if word in name.lower()), names[0] if names else None)


def is_model_folder(path: Path) -> bool:
    """Whether a folder is one model or pipeline in the layout of diffusers or transformers."""
    _, _, files = next(walk_visible(path), (path, [], []))
    return _is_model(files)


def _about_pickle(name: str) -> str:
    return f"{quoted(name)} is a pickle, which could run code; convert it to safetensors"


def _check_name(name: Any) -> None:
    """Raise ValueError for a name that no list has."""
    reason = refusal(name)
    if reason is None and any(is_hidden(part) for part in Path(_with_slashes(name)).parts):
        reason = "must not be a hidden file or folder"
    if reason is not None:
        raise ValueError(f"a model's name {reason}, got {quoted(name)}; choose it from the list")


def _usable(roots: Sequence[Path]) -> list[Path]:
    """The roots whose files can be opened: those with a name in UTF-8."""
    return [root for root in roots if is_encodable(str(root))]


def _candidates(roots: Sequence[Path], folder: str, name: str) -> Iterator[Path]:
    """Where the name may be: exactly as given, with slashes, renamed, in the other Unicode form."""
    spellings = dict.fromkeys((name, _with_slashes(name)))
    yield from (root / spelling for spelling in spellings for root in roots)
    yield PACK_MODELS / folder / RENAMED.get(name, name)
    if not name.isascii():
        wanted = _normalized(name)
        for root in roots:
            yield from (root / path for path in names_in([root], folder) if _normalized(path) == wanted)


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def _normalized(name: str | Path) -> str:
    """The name with slashes and composed accents: macOS may store é as e and an accent."""
    return unicodedata.normalize("NFC", _with_slashes(os.fspath(name)))


def _is_model(names: Iterable[str]) -> bool:
    names = set(names)
    weights = any(has_ending(name, SAFETENSORS) for name in names)
    index = any(has_ending(name, INDICES) for name in names)
    return "model_index.json" in names or index or ("config.json" in names and weights)


def _entries(root: Path, folder: str) -> Iterator[Path]:
    """Files, and folders that are one model, below a root."""
    endings = FILES_ONLY.get(folder, MODEL_FILES)
    for place, inner, files in walk_visible(root):
        if folder not in FILES_ONLY and place != root and _is_model(files):
            yield place
            inner.clear()
        else:
            yield from (place / name for name in files if has_ending(name, endings))
