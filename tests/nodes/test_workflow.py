"""The shipped workflows: nodes known, links of one type, widgets in bounds, nothing overlapping."""

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
from rectiflux.miniature.evaluate import FAMILY

from . import graphs

WORKFLOWS = Path(rectiflux.__file__).parent / "workflows"
PATHS = sorted(WORKFLOWS.glob("*.json"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
NAMES = ("pro_negative_prompt", "schnell_1_step", "schnell_4_steps", "steps_side_by_side", "text_to_image")
ONE_IMAGE = tuple(name for name in NAMES if name != "steps_side_by_side")


def graph(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_holds_workflows_and_their_thumbnails_only() -> None:
    """ComfyUI lists every JSON file here as a template."""
    assert [path.stem for path in PATHS] == list(NAMES)
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


def inputs_of(name: str, folder: Path) -> list[tuple[str, Any]]:
    """(name, value) of every input of every node of a shipped workflow."""
    info = Registry.of_pack(Folders.under(folder)).object_info()
    prompt = to_prompt(read_document(WORKFLOWS / f"{name}.json"), info)
    return [pair for node in prompt.values() for pair in node["inputs"].items()]


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_set_has_one_input_of_each_name_to_set(name: str, tmp_path: Path) -> None:
    """`run.py render --set NAME=VALUE` must be unambiguous."""
    inputs = inputs_of(name, tmp_path)
    for wanted in ("prompt", "seed", "negative_prompt", "steps", "width"):
        assert sum(wanted == other for other, _ in inputs) == 1
    solver = "euler_ancestral" if name == "pro_negative_prompt" else "euler"
    assert ("filename_prefix", "rectiflux") in inputs and ("solver", solver) in inputs


@pytest.mark.parametrize(
    ("name", "variant", "steps"),
    [
        ("text_to_image", "dev", 28),
        ("pro_negative_prompt", "pro", 28),
        ("schnell_4_steps", "schnell", 4),
        ("schnell_1_step", "schnell", 1),
    ],
)
def test_workflows_use_a_variant_as_it_is_scored(name: str, variant: str, steps: int, tmp_path: Path) -> None:
    """But for text_to_image's solver, which is that of FLUX.1 [dev]'s own code."""
    inputs, way = inputs_of(name, tmp_path), FAMILY[variant]
    assert ("model_name", f"rectiflux-mini-{variant}.safetensors") in inputs
    assert ("steps", steps) in inputs and (steps == way.steps or variant == "schnell")
    assert ("cfg_scale", way.cfg_scale) in inputs and ("shift", way.shift) in inputs
    assert way.guidance is None or ("guidance", way.guidance) in inputs
    assert ("solver", "euler" if variant == "dev" else way.solver) in inputs


def test_side_by_side_differs_in_steps_alone(tmp_path: Path) -> None:
    """Five schedules of one noise; the labels name them in the order of the images."""
    info = Registry.of_pack(Folders.under(tmp_path)).object_info()
    prompt = to_prompt(read_document(WORKFLOWS / "steps_side_by_side.json"), info)
    (sheet,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "RectifluxSideBySide")
    shown, noises = [], set()
    for column in range(1, 6):
        decode = prompt[sheet[f"image_{column}"][0]]["inputs"]
        sampler = prompt[decode["samples"][0]]["inputs"]
        shown.append(prompt[sampler["sigmas"][0]]["inputs"]["steps"])
        noises.add((sampler["noise"][0], sampler["latent"][0], sampler["model"][0], sampler["positive"][0]))
    assert shown == [1, 2, 4, 8, 28] and len(noises) == 1
    assert sheet["labels"].splitlines() == ["1 step", "2 steps", "4 steps", "8 steps", "28 steps"]


@each
def test_the_thumbnail_is_the_workflows_image(path: Path, tmp_path: Path) -> None:
    """512 wide, as JPEG; to be saved again when the miniature or the workflow changes."""
    folders = Folders.under(tmp_path)
    prompt = to_prompt(read_document(path), Registry.of_pack(folders).object_info())
    (save,) = (node for node in prompt.values() if node["class_type"] == "SaveImage")
    with context.using(folders):
        generated = graphs.run(prompt, save["inputs"]["images"][0])[0][0].numpy()
    height, width = generated.shape[:2]
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.size == (512, round(512 * height / width))
        shown = np.asarray(thumbnail) / 255
    image = Image.fromarray((generated * 255).round().astype(np.uint8))
    expected = np.asarray(image.resize(thumbnail.size, Image.Resampling.BICUBIC)) / 255
    assert np.mean((shown - expected) ** 2) < 10**-3  # 30 dB
