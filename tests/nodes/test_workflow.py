"""The shipped workflow: nodes known, links of one type, widgets in bounds, nothing overlapping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rectiflux
from PIL import Image
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.workflow import read_document, to_prompt

from . import graphs

WORKFLOWS = Path(rectiflux.__file__).parent / "workflows"
PATHS = sorted(WORKFLOWS.glob("*.json"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
DEMO = {
    "width": 128,
    "height": 128,
    "batch_size": 1,
    "steps": 20,
    "solver": "euler",
    "cfg_scale": 3.0,
    "seed": 7,
}


def graph(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_holds_workflows_and_their_thumbnails_only() -> None:
    """ComfyUI lists every JSON file here as a template."""
    assert [path.name for path in PATHS] == ["text_to_image.json"]
    others = {path.suffix for path in WORKFLOWS.iterdir()} - {".json"}
    assert others <= {".jpg"}


@each
def test_links_join_outputs_and_inputs_of_their_type(path: Path, tmp_path: Path) -> None:
    info = Registry.of_pack(Folders.under(tmp_path)).object_info()
    saved = graph(path)
    nodes = {node["id"]: node for node in saved["nodes"]}
    for number, origin, slot, target, input_slot, kind in saved["links"]:
        assert nodes[origin]["outputs"][slot]["type"] == nodes[target]["inputs"][input_slot]["type"] == kind
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][input_slot]["link"] == number
        assert info[nodes[origin]["type"]]["output"][slot] == kind
        assert info[nodes[origin]["type"]]["output_name"][slot] == nodes[origin]["outputs"][slot]["name"]


@each
def test_nodes_do_not_overlap_and_lie_in_a_group(path: Path) -> None:
    saved = graph(path)
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
             for node in saved["nodes"]]  # fmt: skip
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other_left, other_top, other_right, other_bottom in boxes[:i]:
            apart = right <= other_left or other_right <= left
            assert apart or bottom <= other_top - 30 or other_bottom <= top - 30  # 30: a node's title bar


@each
def test_the_prompt_is_complete_and_in_bounds(path: Path, tmp_path: Path) -> None:
    registry = Registry.of_pack(Folders.under(tmp_path))
    prompt = to_prompt(read_document(path), registry.object_info())
    for node in prompt.values():
        for name, (kind, options, required) in registry.input_specs(node["class_type"]).items():
            assert name in node["inputs"] or not required
            value = node["inputs"].get(name, options.get("default"))
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


def test_the_demo_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    info = Registry.of_pack(Folders.under(tmp_path)).object_info()
    prompt = to_prompt(read_document(WORKFLOWS / "text_to_image.json"), info)
    inputs = [(name, value) for node in prompt.values() for name, value in node["inputs"].items()]
    for name, value in DEMO.items():
        assert (name, value) in inputs
    for name in ("prompt", "seed", "negative_prompt", "steps", "width"):  # --set NAME=... must be unambiguous
        assert sum(name == other for other, _ in inputs) == 1
    assert ("filename_prefix", "rectiflux") in inputs


@each
def test_the_thumbnail_is_what_the_workflow_paints(path: Path, tmp_path: Path) -> None:
    """Four times as large, as JPEG; to be saved anew when the miniature or the workflow changes."""
    folders = Folders.under(tmp_path)
    prompt = to_prompt(read_document(path), Registry.of_pack(folders).object_info())
    (save,) = (node for node in prompt.values() if node["class_type"] == "SaveImage")
    with context.using(folders):
        painted = graphs.run(prompt, save["inputs"]["images"][0])[0][0].numpy()
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.size == (512, 512)
        shown = np.asarray(thumbnail.resize((128, 128), Image.Resampling.BOX)) / 255
    assert np.mean((shown - painted) ** 2) < 10**-3  # 30 dB
