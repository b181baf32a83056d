"""A pack of tiny nodes for the host's tests, with the host's folders in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.host import context, files
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.server import Server

from ..nodes.tiny import write_models
from .client import Client
from .render_command import Command


class Number:
    """Outputs value * scale."""

    RETURN_TYPES = ("NUMBER",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "value": ("INT", {"default": 1, "min": 0, "max": 10}),
                "scale": ("FLOAT", {"default": 1.0, "min": 0.5, "max": 2.0}),
                "mode": (["plain", "bold"], {"default": "plain"}),
                "label": ("STRING", {"default": ""}),
                "sure": ("BOOLEAN", {"default": True}),
            }
        }

    def run(self, value: int, scale: float, mode: str, label: str, sure: bool) -> tuple[float]:
        return (value * scale,)


class Add:
    """Outputs a + b with progress, a preview and a notice; fails for a = 7, 8, 9."""

    RETURN_TYPES = ("NUMBER", "TEXT")
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": ("NUMBER",)}, "optional": {"b": ("NUMBER",)}}

    def run(self, a: float, b: float = 0.0) -> tuple[float, str]:
        if a == 7:
            raise ValueError("seven is refused; choose another number")
        if a == 8:
            raise KeyError("a bug")
        if a == 9:
            raise MemoryError
        context.progress(1, 2)
        context.preview(lambda: torch.full((2, 4, 3), 200, dtype=torch.uint8))
        context.notice("half way")
        context.progress(2, 2)
        return a + b, "sum"


class Gray:
    """An image 8 wide and 4 high, `number` / 10 bright."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"number": ("NUMBER",)}}

    def run(self, number: float) -> tuple[torch.Tensor]:
        return (torch.full((1, 4, 8, 3), number / 10),)


NODES = {"Number": Number, "Add": Add, "Gray": Gray}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders.under(tmp_path / "data")


@pytest.fixture
def registry(folders: Folders) -> Registry:
    return Registry(NODES, {"Add": "Add Numbers"}, folders)


class Prompts:
    """Builds prompts of the tiny nodes."""

    @staticmethod
    def number(value: Any = 1, **widgets: Any) -> dict[str, Any]:
        inputs = {"value": value, "scale": 1.0, "mode": "plain", "label": "", "sure": True, **widgets}
        return {"class_type": "Number", "inputs": inputs}

    def image(self, a: Any = 2, b: Any = 3) -> dict[str, Any]:
        """Two numbers (1, 2), their sum (3) as an image (4), saved (5)."""
        return {
            "1": self.number(a),
            "2": self.number(b),
            "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
            "4": {"class_type": "Gray", "inputs": {"number": ["3", 0]}},
            "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "sum"}},
        }


@pytest.fixture
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack's folder with a script, a help page and an example workflow."""
    files = {
        "web/js/a.js": "export {}",
        "web/docs/Add/en.md": "# Adds",
        "workflows/text_to_image.json": "{}",
        "workflows/text_to_image.jpg": "jpg",
        "secret.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / name).write_text(text)
    return tmp_path / "pack"


@pytest.fixture
def server(registry: Registry, pack: Path, tmp_path: Path) -> Server:
    (tmp_path / "frontend" / "assets").mkdir(parents=True)
    (tmp_path / "frontend" / "index.html").write_text("<title>the editor</title>")
    (tmp_path / "frontend" / "assets" / "app-1234.js").write_text("app")
    return Server(registry, tmp_path / "frontend", pack)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server) as client:
        yield client


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def command(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setattr(files, "PACK", tmp_path / "pack")  # data/ is created there
    return Command(tmp_path, models, capsys)
