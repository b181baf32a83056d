"""The host's folders, path checks against traversal, and atomic file writes.

Folder kinds use ComfyUI's names: "input" (uploads), "output" (saved images), "temp" (previews, deleted at the
next start).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..flux_core.weights.file_names import OUTSIDE, is_hidden, refusal
from ..flux_core.weights.messages import quoted
from . import unfinished
from .images import MEDIA_TYPES

PACK = Path(__file__).resolve().parent.parent
KINDS = ("input", "output", "temp")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
PROBE_BYTES = 64 * 1024  # about a small image, so that a full disk is noticed
IMAGE_SUFFIXES = tuple(MEDIA_TYPES)
_ANNOTATED = re.compile(r"^(.*?) \[(input|output|temp)\]$")


class SaveError(RuntimeError):
    """A file could not be written; the message is one sentence for the user."""


@dataclass(frozen=True)
class Folders:
    """The folders the host reads and writes.

    `models`: folders that contain diffusion_models/, text_encoders/, vae/, checkpoints/, loras/.
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
        """Create the folders in `data` (default: the pack's data/), and delete what killed writes left there.

        Raises SaveError.
        """
        data = (data or PACK / "data").absolute()
        paths = {name: data / name for name in ("input", "output", "temp", "user")}
        if output is not None:
            paths["output"] = output.absolute()
        for folder in paths.values():
            make_folder(folder)
            unfinished.sweep(folder)
        return cls(**paths, models=(*models, PACK / "models"))

    def locate(self, filename: str, subfolder: str = "", kind: str = "output") -> Path:
        """The path of a file named as the editor names it. Raises ValueError for one outside its folder."""
        return contained(self.root(kind), subfolder, filename)

    def root(self, kind: str) -> Path:
        """The folder of a kind. Raises ValueError unless it is one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"the folder must be one of {', '.join(KINDS)}, got {quoted(kind)}")
        return getattr(self, kind)

    def annotated(self, name: str) -> Path:
        """The path of an input image; `image.png [output]` names one in another folder."""
        found = _ANNOTATED.match(name)
        return self.locate(found[1], kind=found[2]) if found else self.locate(name, kind="input")

    def images(self, kind: str = "input") -> list[str]:
        """Names of the image files directly in a folder, sorted; each can be located.

        Links are followed. Hidden files and links whose target is missing are left out.
        """
        names = [name for name in os.listdir(self.root(kind)) if name.lower().endswith(IMAGE_SUFFIXES)]
        usable = (name for name in names if not is_hidden(name) and refusal(name) is None)
        return sorted(name for name in usable if os.path.isfile(self.root(kind) / name))


def contained(root: Path, *parts: str) -> Path:
    """The path of `parts` below `root`, with either separator. Raises ValueError when it is not below.

    The names are checked, not where links lead: the owner of the folder may link it to another disk, and a
    request cannot create links.
    """
    shown = "/".join(filter(None, parts))
    for part in filter(None, parts):
        if (reason := refusal(part)) == OUTSIDE:
            raise ValueError(f"{quoted(shown)} does not name a file in the folder {root.name}")
        elif reason is not None:
            raise ValueError(f"{quoted(shown)} {reason}")
    path = Path(root, *parts)
    if "\\" in shown and not os.path.lexists(path):
        path = Path(root, *(part.replace("\\", "/") for part in parts))
    if path == root:
        raise ValueError(f"{quoted(shown)} does not name a file in the folder {root.name}")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{quoted(shown)} is too long for the disk; choose a shorter name") from error
    return path


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises SaveError."""
    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)


def explain(path: Path, error: OSError) -> str:
    """One sentence on why `path` could not be written."""
    if error.errno in NO_SPACE:
        return f"the disk is full, {path.name} was not saved to {path.parent}; free some space and run again"
    if error.errno == errno.ENAMETOOLONG:
        return f"cannot write {quoted(path.name)}: its name is too long for the disk; choose a shorter name"
    if path.is_dir():
        return f"cannot write {path}: it is a folder; choose another name"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"cannot write {path}: {path.parent} is not a folder; choose another name"
    reason = error.strerror or error
    return f"cannot write {path}: {reason}; choose another folder or change its permissions"


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Raise SaveError for an OSError while `path` is changed."""
    try:
        yield
    except OSError as error:
        raise SaveError(explain(path, error)) from error


def check_writable(folder: Path) -> None:
    """Raise SaveError when no image can be saved in `folder`: the disk is full or the folder read-only."""
    _write_beside(folder / "image.png", bytes(PROBE_BYTES), lambda part: None)


def write(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Replace `path` atomically: a reader, also after a power failure, sees the old file or the new one.

    `content` may be a function that writes into the open file. A link is replaced, its target stays. Raises
    SaveError.
    """
    _write_beside(path, content, lambda part: os.replace(part, path))


def write_numbered(folder: Path, stem: str, content: Callable[[IO[bytes]], Any]) -> Path:
    """Write a new PNG `<stem>_00001_.png`, counting on from the highest index in use. Raises SaveError."""
    make_folder(folder)
    pattern = re.compile(re.escape(stem) + r"_(\d{1,12})_?\.\w+", re.IGNORECASE)

    def publish(part: Path) -> Path:
        used = [int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name))]
        index = max(used, default=0)
        while True:
            index += 1
            path = folder / f"{stem}_{index:05}_.png"
            try:
                os.link(part, path)  # unlike a rename this fails when another program has taken the name
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                if path.exists():
                    continue
                os.replace(part, path)
            return path

    return _write_beside(folder / f"{stem}.png", content, publish)


def _write_beside(
    path: Path, content: bytes | Callable[[IO[bytes]], Any], publish: Callable[[Path], Any]
) -> Any:
    """Write and fsync a hidden file next to `path`, then return `publish(that file)`."""
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part, file = unfinished.create(path)
        try:
            with file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
                if os.name != "nt":  # there an open file cannot be renamed
                    return publish(part)
            return publish(part)
        finally:
            with suppress(OSError):  # the first error is the one to report
                part.unlink(missing_ok=True)
