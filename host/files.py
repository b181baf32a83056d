"""The host's folders, paths that cannot leave them, and files that appear whole or not at all.

Folders are called by the ecosystem's words: "input" (uploads), "output" (finished pictures), "temp"
(previews, emptied at every start).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PACK = Path(__file__).resolve().parent.parent
KINDS = ("input", "output", "temp")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
PROBE = 64 * 1024  # bytes, the size of a small picture
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ANNOTATED = re.compile(r"^(.*?) \[(input|output|temp)\]$")


class SaveError(RuntimeError):
    """A file could not be written; the message is one sentence for the user."""


@dataclass(frozen=True)
class Folders:
    """Where everything lies.

    `models`: folders that hold diffusion_models/, text_encoders/, vae/, checkpoints/, loras/.
    """

    input: Path
    output: Path
    temp: Path
    user: Path
    models: tuple[Path, ...]

    @classmethod
    def under(
        cls, data: Path | None = None, output: Path | None = None, models: tuple[Path, ...] = ()
    ) -> Folders:
        """The folders in `data` (the pack's data/ by default), made. Raises SaveError when they cannot be."""
        data = (data or PACK / "data").absolute()
        made = {name: data / name for name in ("input", "output", "temp", "user")}
        if output is not None:
            made["output"] = output.absolute()
        for folder in made.values():
            make_folder(folder)
        return cls(**made, models=(*models, PACK / "models"))

    def locate(self, filename: str, subfolder: str = "", kind: str = "output") -> Path:
        """The path of a file as the editor names it. Raises ValueError for one outside its folder."""
        return contained(self._root(kind), subfolder, filename)

    def _root(self, kind: str) -> Path:
        if kind not in KINDS:
            raise ValueError(f"the folder must be one of {', '.join(KINDS)}, got {kind!r}")
        return getattr(self, kind)

    def annotated(self, name: str) -> Path:
        """The path of an input picture; `picture.png [output]` takes it from another folder."""
        found = _ANNOTATED.match(name)
        return self.locate(found[1], kind=found[2]) if found else self.locate(name, kind="input")

    def pictures(self, kind: str = "input") -> list[str]:
        """Names of the pictures at the top of a folder."""
        paths = self._root(kind).iterdir()
        return sorted(path.name for path in paths if path.is_file() and path.suffix.lower() in PICTURES)


def contained(root: Path, *parts: str) -> Path:
    """The path of `parts` below `root`, links followed. Raises ValueError when it is not below."""
    root = root.resolve()
    path = Path(root, *(part.replace("\\", "/") for part in parts)).resolve()
    if path == root or not path.is_relative_to(root):
        raise ValueError(f"{'/'.join(filter(None, parts))!r} is no name of a file in the folder {root.name}")
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises SaveError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(explain(folder, error)) from error


def explain(path: Path, error: OSError) -> str:
    """One sentence on why `path` could not be written."""
    if error.errno in NO_SPACE:
        return f"the disk is full, {path.name} was not saved to {path.parent}; free some space and run again"
    return f"{path} cannot be written: {error.strerror or error}; choose another folder or change its rights"


def check_writable(folder: Path) -> None:
    """Raise SaveError when no picture can be saved in a folder: its disk is full, or it may only be read."""
    _write_beside(folder / "picture.png", bytes(PROBE), lambda part: None)


def write(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Replace `path` in one step: a reader, or a start after a power cut, sees the old file or the new one.

    `content` may be a function that writes into the open file. Raises SaveError.
    """
    _write_beside(path, content, lambda part: os.replace(part, path))


def write_numbered(folder: Path, stem: str, content: Callable[[IO[bytes]], Any]) -> Path:
    """Write a new PNG `<stem>_00001_.png`, with the first number after those in use. Raises SaveError."""
    make_folder(folder)
    pattern = re.compile(re.escape(stem) + r"_(\d{1,12})_?\.\w+", re.IGNORECASE)

    def publish(part: Path) -> Path:
        used = [int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name))]
        number = max(used, default=0)
        while True:
            number += 1
            path = folder / f"{stem}_{number:05}_.png"
            try:
                os.link(part, path)  # unlike a rename it fails when another program took the number meanwhile
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                if path.exists():
                    continue
                os.replace(part, path)
            return path

    return _write_beside(folder / f"{stem}.png", content, publish)


def _write_beside(
    path: Path, content: bytes | Callable[[IO[bytes]], Any], publish: Callable[[Path], Any]
) -> Any:
    """Write a hidden file next to `path`, flushed to the disk, then `publish` it; what that returns."""
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        return publish(part)
    except OSError as error:
        raise SaveError(explain(path, error)) from error
    finally:
        with suppress(OSError):  # what went wrong before is what counts
            part.unlink(missing_ok=True)
