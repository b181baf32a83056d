"""What ComfyUI's editor gets of the pack: nodes, models, the example workflow, help pages."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rectiflux.nodes import NODES

from .conftest import DEV
from .server import PACK, ComfyServer


def test_every_node_appears(comfy: ComfyServer) -> None:
    info = comfy.get("/api/object_info")
    for node in NODES:
        told = info[node.NODE_ID]
        assert told["display_name"] == node.TITLE
        assert told["category"] == node.CATEGORY
        assert told["description"] == node.DESCRIPTION
        assert told["python_module"] == "custom_nodes.rectiflux"
        assert tuple(told["output"]) == node.RETURN_TYPES
        assert tuple(told["output_name"]) == node.RETURN_NAMES
    ours = {name for name, told in info.items() if told["python_module"] == "custom_nodes.rectiflux"}
    assert ours == {node.NODE_ID for node in NODES}


def test_the_pack_loads_without_a_complaint(comfy: ComfyServer) -> None:
    started = comfy.console().partition("To see the GUI go to")[0]
    said = [line for line in started.splitlines() if "rectiflux" in line.lower()]
    assert len(said) == 1 and "seconds: " in said[0] and "FAILED" not in said[0]  # the table of import times


def test_the_models_that_come_with_the_pack_are_listed_after_the_artists_own(comfy: ComfyServer) -> None:
    inputs = comfy.get("/api/object_info/RectifluxModelLoader")["RectifluxModelLoader"]["input"]
    names = inputs["required"]["model_name"][0]
    shipped = sorted(path.name for path in (PACK / "models" / "diffusion_models").glob("*.safetensors"))
    own, last = names[: -len(shipped)], names[-len(shipped) :]
    assert last == shipped and {DEV, "tiny.safetensors"} <= set(own) and own == sorted(own)


def test_the_workflows_are_offered_as_templates_with_their_pictures(comfy: ComfyServer) -> None:
    shipped = {path.stem for path in (PACK / "workflows").glob("*.json")}
    assert "text_to_image" in shipped and set(comfy.get("/api/workflow_templates")["rectiflux"]) == shipped
    for name in shipped:
        with Image.open(io.BytesIO(comfy.fetch(f"/api/workflow_templates/rectiflux/{name}.jpg"))) as shown:
            assert shown.format == "JPEG" and shown.size[0] == 512
    assert comfy.get("/api/workflow_templates/rectiflux/text_to_image.json")["nodes"]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.NODE_ID)
def test_a_help_page_is_served_for_every_node(comfy: ComfyServer, node: type) -> None:
    page = comfy.fetch(f"/extensions/rectiflux/docs/{node.NODE_ID}/en.md").decode()
    assert page.startswith(f"# {node.TITLE}\n")
