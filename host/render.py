"""`python3 run.py render`: a workflow file run without the editor, into pictures with the workflow inside.

Pictures' paths go to stdout, one a line; the progress bar, texts that nodes show, notices and errors to
stderr. Exit code 0, or 1 after one sentence for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .arguments import Parser
from .execution import Executor, Result
from .files import Folders, SaveError, check_writable
from .registry import Registry
from .validation import Checked, InvalidPrompt, validate
from .workflow import WorkflowError, apply_settings, read_document, to_prompt

BAR_WIDTH = 30
PREVIEWS = ("PreviewImage", "PreviewAny")
"""Nodes that show something and save nothing."""


class ProgressBar:
    """What the executor tells, as a line that is redrawn; off a terminal, a line for each node with steps."""

    def __init__(self, stream: TextIO, title: Callable[[str], str]) -> None:
        self.stream = stream
        self.title = title
        self.redraws = stream.isatty()
        self.drawn = 0
        self.node = ""
        self.steps = ""
        self.started = time.monotonic()

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """An event of `Executor.run`."""
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
            self.stream.write(f"note: {data['text']}\n")

    def finish_node(self) -> None:
        """Keep the line of a node that had steps, with the seconds that it took."""
        self.clear()
        if self.steps:
            self.stream.write(f"{self.node} {self.steps} {time.monotonic() - self.started:.1f} s\n")
        self.steps = ""
        self.stream.flush()

    def clear(self) -> None:
        if self.drawn:
            self.stream.write("\r" + " " * self.drawn + "\r")
            self.drawn = 0

    def _draw(self, text: str) -> None:
        if self.redraws:
            self.clear()
            self.stream.write(text)
            self.stream.flush()
            self.drawn = len(text)


def render(
    path: str | Path,
    folders: Folders,
    settings: list[str] | None = None,
    on_event: Callable[[Registry, Checked], Callable[[str, dict[str, Any]], None]] | None = None,
) -> Result:
    """Run the workflow in a file; its pictures lie in `folders.output` and carry the values that made them.

    `on_event` makes the executor's listener for what will run. Raises WorkflowError, InvalidPrompt, and
    SaveError for a folder that takes no pictures, before anything runs; what a node raises is in the result.
    """
    registry = Registry.of_pack(folders)
    document = read_document(path)
    info = registry.object_info()
    if settings:
        document = apply_settings(document, settings, info)
    checked = validate(to_prompt(document, info), registry)
    if checked.node_errors:
        raise InvalidPrompt({"message": "the workflow cannot run as it is"}, checked.node_errors)
    if all(checked.prompt[number]["class_type"] in PREVIEWS for number in checked.outputs):
        raise WorkflowError(f"{path} saves no picture, it only previews; add a Save Image node")
    check_writable(folders.output)
    return Executor(registry).run(
        checked,
        on_event=on_event(registry, checked) if on_event else None,
        extra_pnginfo={} if document.graph is None else {"workflow": document.graph},
    )


def title_of(registry: Registry, checked: Checked, number: str) -> str:
    """What the editor writes on a node."""
    node = checked.prompt[number]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return str(title or registry.title(node["class_type"]))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="run.py render",
        description="Run a workflow file without the editor; prints the paths of the pictures that it saves.",
    )
    parser.add_argument(
        "workflow", help="a workflow (.json: the editor's or the API format), or a .png with one inside"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a widget, by its name or as NODE_ID.NAME; may be given several times",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where pictures go (default: data/output)")
    parser.add_models()
    parser.add_argument("--verbose", action="store_true", help="show the log, with tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The command; its exit code."""
    arguments = parse(argv)
    log = logging.getLogger(__package__.partition(".")[0])  # the whole pack's
    handler = logging.StreamHandler(sys.stderr) if arguments.verbose else logging.NullHandler()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if arguments.verbose else logging.NOTSET)
    log.propagate = False  # errors are told below, in the command's own words
    bars: list[ProgressBar] = []

    def listen(registry: Registry, checked: Checked) -> ProgressBar:
        bars.append(ProgressBar(sys.stderr, lambda number: title_of(registry, checked, number)))
        return bars[0]

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
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = True
    for output in result.outputs.values():
        sys.stderr.writelines(f"{text}\n" for text in output.get("text", ()))
    try:
        for image in result.images():
            sys.stdout.write(f"{folders.locate(image['filename'], image['subfolder'])}\n")
        sys.stdout.flush()
    except (OSError, UnicodeError) as error:  # a closed pipe, a full disk, an alphabet that it cannot show
        sys.stdout = None  # or Python would try, and fail, once more at its end
        return _fail([f"the pictures are in {folders.output}, but their names cannot be printed: {error}"])
    if result.error is not None:
        return _fail([f"node {result.error.node_id} ({result.error.class_type}): {result.error.message}"])
    return 0


def _fail(sentences: list[str]) -> int:
    told = set()
    for sentence in sentences:
        what = sentence.partition("): ")[2] or sentence
        if what not in told:  # a circle is an error of each node on it
            sys.stderr.write(f"render: {sentence}\n")
        told.add(what)
    return 1
