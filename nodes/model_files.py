"""Model files in the hosts' folders: the names in a loader's list, and the path of such a name.

A list has .safetensors and .gguf files, and folders in the layout of diffusers or transformers, each of which
is one model. The host gives the folders to search, the user's own first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..flux_core.weights.safetensors_file import PICKLES

PACK_MODELS = Path(__file__).resolve().parent.parent / "models"
"""The miniature's files, which come with the pack and are listed in every host."""

RENAMED = {"rectiflux-mini.safetensors": "rectiflux-mini-pro.safetensors"}
"""Files that earlier versions shipped, and what replaced them: saved workflows keep loading."""

ENDINGS = (".safetensors", ".gguf")
FILES_ONLY = {"loras": (".safetensors",)}
"""Kinds of models that are never folders, with the endings of their files."""

ALSO_IN = {"checkpoints": ("diffusion_models",)}
"""Kinds of models that are listed from another kind's folder too."""

MAX_SUGGESTIONS = 5
"""Names that an error about a missing file lists."""


def folders_for(folder: str) -> tuple[str, ...]:
    """Names of the folders below models/ that hold models of one kind."""
    return (folder, *ALSO_IN.get(folder, ()))


def names_in(roots: Sequence[Path], folder: str) -> list[Path]:
    """Relative paths of all models of one kind below the roots, each once, in the order of the roots."""
    found = [path.relative_to(root) for root in roots for path in sorted(_entries(root, folder))]
    return list(dict.fromkeys(found))


def path_of(roots: Sequence[Path], folder: str, name: str) -> Path:
    """The file or folder of that name. Raises FileNotFoundError, ValueError for ../x."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a model's name must stay in its folder, got {name!r}; choose it from the list")
    paths = [root / name for root in roots] + [PACK_MODELS / folder / RENAMED.get(name, name)]
    for path in paths:
        if path.is_file() or (folder not in FILES_ONLY and path not in roots and is_model_folder(path)):
            return path
    raise FileNotFoundError(f"there is no {name} in models/{folder}; put it there, or choose another file")


def file_state(path: Path) -> str:
    """Names, sizes and times of a model's files, its tokenizer included, which change when they do."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".tokenizer.json")]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return repr([(name, status.st_size, status.st_mtime_ns) for name, status in states])


def path_error(roots: Sequence[Path], folder: str, name: str | None) -> str | None:
    """What is wrong with a model's name, in half a sentence, or None: for VALIDATE_INPUTS."""
    if name is None:
        return None  # the name comes from another node, while the prompt runs
    if str(name).lower().endswith(PICKLES):
        return f"{name!r} is a pickle, which could run code; convert it to safetensors"
    try:
        path_of(roots, folder, name)
    except ValueError as error:
        return str(error)
    except OSError:
        names = [path.as_posix() for path in names_in(roots, folder)]
        shown, hidden = names[:MAX_SUGGESTIONS], len(names) - MAX_SUGGESTIONS
        more = f" and {hidden} more" if hidden > 0 else ""
        return f"{name!r} is not in its list, which has {', '.join(shown)}{more}"
    return None


def prefer(names: list[str], word: str) -> str | None:
    """The first of the names that contains `word`, as a default; else the first."""
    return next((name for name in names if word in name.lower()), names[0] if names else None)


def is_model_folder(path: Path) -> bool:
    """Whether a folder is one model or pipeline in the layout of diffusers or transformers."""
    return path.is_dir() and _is_model(entry.name for entry in path.iterdir())


def _is_model(names: Iterable[str]) -> bool:
    names = set(names)
    weights = any(name.endswith(".safetensors") for name in names)
    index = any(name.endswith(".safetensors.index.json") for name in names)
    return "model_index.json" in names or index or ("config.json" in names and weights)


def _entries(root: Path, folder: str) -> Iterator[Path]:
    """Files, and folders that are one model, below a root; links are followed, each folder visited once."""
    endings, visited = FILES_ONLY.get(folder, ENDINGS), set()
    for place, inner, files in os.walk(root, followlinks=True):
        target = os.path.realpath(place)
        is_model = folder not in FILES_ONLY and Path(place) != root and _is_model(files)
        if is_model and target not in visited:
            yield Path(place)
        if is_model or target in visited:
            inner.clear()
        else:
            yield from (Path(place, name) for name in files if name.lower().endswith(endings))
        visited.add(target)
