"""What a node can call while it runs in the embedded host: progress, preview, notice, interruption, folders.

Outside a run every function does nothing, so that nodes also work in tests and scripts. The state is held in
context variables: each worker thread and each test has its own.
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
    """The running node and the callbacks that receive what it reports."""

    node_id: str
    on_progress: Callable[[str, float, float], None]
    """(node id, value, total)"""
    on_notice: Callable[[str, str], None]
    """(node id, one sentence for the user)"""
    on_preview: Callable[[str, Callable[[], Any]], None] | None = None
    """(node id, function that returns pixels [h, w, 3] uint8); None when previews are off"""
    stop: threading.Event = field(default_factory=threading.Event)


_current: ContextVar[RunContext | None] = ContextVar("run", default=None)
_folders: ContextVar[Folders | None] = ContextVar("folders", default=None)


def current() -> RunContext | None:
    """The context of the node that runs in this thread; None outside a run."""
    return _current.get()


def model_folders() -> tuple[Path, ...]:
    """Folders that contain diffusion_models/, vae/ and so on, the user's before the pack's."""
    folders = _folders.get()
    return (PACK / "models",) if folders is None else folders.models


def folders() -> Folders:
    """The host's folders. Raises LookupError outside a host."""
    if (found := _folders.get()) is None:
        raise LookupError("no host is running, so this node has no input and output folders")
    return found


def progress(value: float, total: float) -> None:
    """Report the progress of the running node. Raises Interrupted when the user has stopped the run."""
    if (run := _current.get()) is not None:
        check_interrupted()
        run.on_progress(run.node_id, value, total)


def preview(make: Callable[[], Any]) -> None:
    """Show an intermediate image; `make` returns pixels [h, w, 3] uint8 and is called only when needed."""
    if (run := _current.get()) is not None and run.on_preview is not None:
        run.on_preview(run.node_id, make)


def notice(text: str) -> None:
    """Show the user one sentence that is not an error, for example that a prompt was truncated."""
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
