"""What a node may ask of the embedded host while it runs: progress, previews, notices, interruption, folders.

Outside a run every function does nothing, so that nodes also work from tests and scripts. The values live in
context variables: each worker thread and each test sees its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import PACK, Folders


class Interrupted(BaseException):
    """The user stopped the run. A BaseException, so that a node's `except Exception` does not swallow it."""


@dataclass(frozen=True)
class RunContext:
    """The node that runs, and where what it tells goes."""

    node_id: str
    on_progress: Callable[[str, float, float], None]
    """(node id, value, total)"""
    on_notice: Callable[[str, str], None]
    """(node id, one sentence for the user)"""
    on_preview: Callable[[str, Callable[[], Any]], None] | None = None
    """(node id, what makes pixels [h, w, 3] uint8); None when nobody watches"""
    stop: threading.Event = field(default_factory=threading.Event)


_current: ContextVar[RunContext | None] = ContextVar("run", default=None)
_folders: ContextVar[Folders | None] = ContextVar("folders", default=None)


def current() -> RunContext | None:
    """The context of the node that runs in this thread, None outside a run."""
    return _current.get()


def model_folders() -> tuple[Path, ...]:
    """Folders with diffusion_models/ and its like in them, the artist's own before the pack's."""
    folders = _folders.get()
    return (PACK / "models",) if folders is None else folders.models


def folders() -> Folders:
    """The host's folders. Raises LookupError where no host has named them."""
    if (found := _folders.get()) is None:
        raise LookupError("no host is running: this node reads and writes its folders")
    return found


def progress(value: float, total: float) -> None:
    """Show how far the running node is. Raises Interrupted when the user has stopped the run."""
    if (run := _current.get()) is not None:
        check_interrupted()
        run.on_progress(run.node_id, value, total)


def preview(make: Callable[[], Any]) -> None:
    """Show the work so far; `make` returns pixels [h, w, 3] uint8 and is called only if they are shown."""
    if (run := _current.get()) is not None and run.on_preview is not None:
        run.on_preview(run.node_id, make)


def notice(text: str) -> None:
    """Tell the user one sentence that is no error, such as that a prompt was cut off."""
    if (run := _current.get()) is not None:
        run.on_notice(run.node_id, text)


def check_interrupted() -> None:
    """Raise Interrupted when the user has stopped the run."""
    if (run := _current.get()) is not None and run.stop.is_set():
        raise Interrupted


@contextmanager
def running(run: RunContext) -> Iterator[None]:
    """Make `run` the current context of this thread."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def using(folders: Folders) -> Iterator[None]:
    """Make `folders` the host's folders in this thread."""
    token = _folders.set(folders)
    try:
        yield
    finally:
        _folders.reset(token)
