"""`run.py render` as tests call it, and what its images contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rectiflux.host import render

from .editor_graph import Graph, node_of, text_to_image


class Command:
    """`run.py render` in its own folder: the workflow in w.json, images in out/."""

    def __init__(self, folder: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.models, self.capsys = folder, models, capsys
        self.stderr = ""

    def main(self, workflow: Graph | Path, *arguments: str) -> int:
        """The exit code."""
        path = workflow if isinstance(workflow, Path) else self.folder / "w.json"
        if not isinstance(workflow, Path):
            path.write_text(json.dumps(workflow), encoding="utf-8")
        options = ["--models", str(self.models), "--out", str(self.folder / "out")]
        return render.main([str(path), *options, *arguments])

    def __call__(self, workflow: Graph | Path, *arguments: str, code: int = 0) -> list[Path]:
        """The saved images."""
        assert self.main(workflow, *arguments) == code
        printed = self.capsys.readouterr()
        self.stderr = printed.err
        return [Path(line) for line in printed.out.splitlines()]

    def refuses(self, workflow: Graph | Path, *arguments: str) -> str:
        """The one sentence on stderr of a run that ends with exit code 1 and saves nothing."""
        assert self(workflow, *arguments, code=1) == []
        lines = [line for line in self.stderr.splitlines() if not line.startswith("FLUX Sampler [")]
        assert len(lines) == 1 and lines[0].startswith("render: ") and "Traceback" not in self.stderr, lines
        assert not list((self.folder / "out").glob("**/*.p*")), "an image, complete or partial"
        return lines[0].removeprefix("render: ")


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, workflow) in an image."""
    with Image.open(path) as image:
        return json.loads(image.text["prompt"]), json.loads(image.text["workflow"])


def changed(node_id: int, values: list[Any] | None = None, **more: Any) -> Graph:
    """The graph with the widget values, or other keys, of one node replaced."""
    graph = text_to_image()
    node_of(graph, node_id).update(more if values is None else {"widgets_values": values, **more})
    return graph
