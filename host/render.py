"""The command `python3 run.py render`: runs a workflow file without the editor and saves its images.

Paths of the images are printed to stdout, one per line; the progress bar, texts that nodes show, notices and
errors to stderr. Exit code 0, or 1 after one sentence for each error.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import terminal
from .arguments import Parser
from .execution import Executor, Result
from .files import Folders, SaveError, check_writable
from .registry import Registry
from .validation import Checked, InvalidPrompt, validate
from .workflow import WorkflowError, apply_settings, read_document, to_prompt

BAR_WIDTH = 30
PREVIEWS = ("PreviewImage", "PreviewAny")
"""Output nodes that save nothing."""


class ProgressBar:
    """Prints a run's progress: one redrawn line on a terminal, else one line for each node with steps."""

    def __init__(self, stream: TextIO | None, title: Callable[[str], str]) -> None:
        self.stream = stream
        self.title = title
        self.redraws = stream is not None and stream.isatty()
        self.drawn = 0
        self.node = ""
        self.steps = ""
        self.started = time.monotonic()

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """Receive an event of `Executor.run`."""
        if kind == "executing":
            self.finish_node()
            self.node, self.steps, self.started = self.title(data["node"]), "", time.monotonic()
            self._draw(self.node)
        elif kind == "progress":
            done, total = data["value"], max(data["max"], 1)
            filled = int(BAR_WIDTH * done / total)
            self.steps = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done:g}/{total:g}"
            self._draw(f"{self.node} {self.steps}")
        elif kind == "notice":
            self.clear()
            self._write(f"note: {data['text']}\n")

    def finish_node(self) -> None:
        """Print the final line of a node with steps, with its seconds."""
        self.clear()
        if self.steps:
            self._write(f"{self.node} {self.steps} {time.monotonic() - self.started:.1f} s\n")
        self.steps = ""

    def clear(self) -> None:
        """Erase the line that is drawn."""
        if self.drawn:
            self._write("\r" + " " * self.drawn + "\r")
            self.drawn = 0

    def _draw(self, text: str) -> None:
        if self.redraws:
            self.clear()
            self._write(text)
            self.drawn = len(text)

    def _write(self, text: str) -> None:
        if self.stream is not None:
            terminal.report(text, self.stream)


def render(
    path: str | Path,
    folders: Folders,
    settings: list[str] | None = None,
    on_event: Callable[[Registry, Checked], Callable[[str, dict[str, Any]], None]] | None = None,
) -> Result:
    """Run the workflow in a file; images are saved in `folders.output` with the workflow as metadata.

    `on_event` creates the executor's listener for the validated prompt. Before anything runs, raises
    WorkflowError, InvalidPrompt, or SaveError if no image can be saved; a node's error is in the result.
    """
    registry = Registry.of_pack(folders)
    document = read_document(path)
    info = registry.object_info()
    if settings:
        document = apply_settings(document, settings, info)
    checked = validate(to_prompt(document, info), registry)
    if checked.node_errors:
        raise InvalidPrompt({"message": "the workflow cannot run"}, checked.node_errors)
    if all(checked.prompt[node_id]["class_type"] in PREVIEWS for node_id in checked.outputs):
        raise WorkflowError(f"{path} has only preview nodes and saves no image; add a Save Image node")
    check_writable(folders.output)
    return Executor(registry).run(
        checked,
        on_event=on_event(registry, checked) if on_event else None,
        extra_pnginfo={} if document.graph is None else {"workflow": document.graph},
    )


def title_of(registry: Registry, checked: Checked, node_id: str) -> str:
    """The title that the editor shows on a node."""
    node = checked.prompt[node_id]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return str(title or registry.title(node["class_type"]))


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of `python3 run.py render`."""
    parser = Parser(
        prog="run.py render",
        description="Run a workflow file without the editor; print the paths of the saved images.",
    )
    parser.add_argument(
        "workflow",
        help="a workflow (.json, the editor's or the API format) or a .png with one inside",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a widget by NAME or NODE_ID.NAME; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the images (default: data/output)")
    parser.add_models()
    parser.add_argument("--verbose", action="store_true", help="show the log, with tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = parse(argv)
    bars: list[ProgressBar] = []

    def listen(registry: Registry, checked: Checked) -> ProgressBar:
        bars.append(ProgressBar(sys.stderr, lambda node_id: title_of(registry, checked, node_id)))
        return bars[0]

    with _log_to_stderr(arguments.verbose):
        try:
            folders = Folders.under(output=arguments.out, models=tuple(arguments.models))
            result = render(arguments.workflow, folders, arguments.set, listen)
        except InvalidPrompt as error:
            return _fail(error.sentences())
        except (WorkflowError, SaveError) as error:
            return _fail([str(error)])
        finally:
            for bar in bars:
                bar.finish_node()
    return _print_result(result, folders)


@contextmanager
def _log_to_stderr(verbose: bool) -> Iterator[None]:
    """Log to stderr, or nowhere unless `verbose`: `main` reports errors in one sentence each."""
    log = logging.getLogger(__package__.partition(".")[0])  # the whole pack's
    handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.NOTSET)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = True


def _print_result(result: Result, folders: Folders) -> int:
    """Print texts to stderr and paths of images to stdout; returns the exit code."""
    for output in result.outputs.values():
        terminal.report("".join(f"{text}\n" for text in output.get("text", ())))
    try:
        for image in result.images():
            terminal.write(sys.stdout, f"{folders.locate(image['filename'], image['subfolder'])}\n")
    except OSError as error:  # a closed pipe or a full disk
        return _fail([f"the images are in {folders.output}, but their paths cannot be printed: {error}"])
    if result.error is not None:
        return _fail([f"node {result.error.node_id} ({result.error.class_type}): {result.error.message}"])
    return 0


def _fail(sentences: list[str]) -> int:
    """Print each error once; returns exit code 1."""
    reported = set()
    for sentence in sentences:
        message = sentence.partition("): ")[2] or sentence
        if message not in reported:  # every node of a cycle has the same error
            terminal.report(f"render: {sentence}\n")
        reported.add(message)
    return 1
