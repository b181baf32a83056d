"""Placeholders in `filename_prefix`, replaced as the editor does before it sends a prompt.

Expected texts were observed in comfyui-frontend-package 1.58.1. Public reports: Comfy-Org/ComfyUI#7996,
#2832, #364 (a prefix from a PrimitiveNode).
"""

from __future__ import annotations

import copy
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.host.placeholders import as_text, format_date
from rectiflux.host.registry import Registry
from rectiflux.host.workflow import Document, apply_settings, to_prompt

from .graphs import INFO, graph, node

IMAGES = {"images": ["NUM", {}], "filename_prefix": ["STRING", {"default": "ComfyUI"}]}
CLASSES = {**INFO, "SaveImage": {"input": {"required": IMAGES}, "display_name": "Save Image"}}


def saved(prefix: Any, *nodes: dict[str, Any], links: Any = ()) -> dict[str, Any]:
    """Number (1: seed 7), Mix (2: text "a red/blue: heart") titled Blend, and Save Image (3)."""
    named = {"Node name for S&R": "Named"}
    number, mix = (
        node(1, "Number", [7, "fixed", 2.0]),
        node(2, "Mix", ["mul", "a red/blue: heart"], title="Blend"),
    )
    return graph(
        [number, mix, node(3, "SaveImage", [prefix]), node(4, "Number", [8], properties=named), *nodes],
        list(links),
    )


def prefix_of(document: dict[str, Any]) -> Any:
    return to_prompt(Document(document, None), CLASSES)["3"]["inputs"]["filename_prefix"]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("%Number.seed%_%Blend.text%_%width%_%Nope.x%", "7_a red_blue_ heart_%width%_%Nope.x%"),
        ("%Mix.mode%%Mix.n%%Mix.flag%", "mul4false"),
        ("%A Number.seed%_%Number.scale%_%Named.seed%", "7_2_8"),
        ("%Number.nope%_%a.b.c%_%date%_%%_%a_b%", "%Number.nope%_%a.b.c%_%date%_%%_%a_b%"),
        ("%SaveImage.filename_prefix%", "%SaveImage.filename_prefix%"),
        ("%Save Image.filename_prefix%:", "%Save Image.filename_prefix%_:"),
        (5, 5),
        (None, None),
    ],
)
def test_the_prefix_is_expanded(text: Any, right: Any) -> None:
    assert prefix_of(saved(text)) == right


def test_dates() -> None:
    moment = datetime(2026, 3, 4, 5, 6, 7)
    assert format_date("yyyy-yy-MM-M-dd-d", moment) == "2026-26-03-3-04-4"
    assert format_date("hh:h mm:m ss:s zz yyy y", moment) == "05:5 06:6 07:7 zz yyy y"
    assert prefix_of(saved("%date:yyyy-MM-dd%/%date:zz%")) == time.strftime("%Y-%m-%d/zz")
    assert prefix_of(saved("%date:yyyy.MM.dd%_%date:yyyy.MM%")) == time.strftime("%Y_%%date:yyyy.MM%%")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (True, "true"), (1.0, "1"), (2.5, "2.5"), (1e-5, "0.00001"), (1e-7, "1e-7"),
        (1e21, "1e+21"), (1e20, "100000000000000000000"), ([1, "a"], "1,a"), ({}, "[object Object]"),
    ],
)  # fmt: skip
def test_values_are_written_as_javascript_does(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_characters_that_names_cannot_have_are_replaced() -> None:
    document = saved("%Blend.text%")
    document["nodes"][1]["widgets_values"][1] = 'a/b\\c:d*e?f"g<h>i|j\x7fk\nl..%width%'
    assert prefix_of(document) == "a_b_c_d_e_f_g_h_i_j_k_l..%width%"


def test_the_first_node_of_a_name_counts_also_a_muted_one_or_one_in_a_subgraph() -> None:
    document = saved("%Number.seed%_%my.noise.seed%")
    document["nodes"].insert(0, node(9, "Number", [9], mode=2, title="my.noise"))
    assert prefix_of(document) == "9_%my.noise.seed%"
    inside = node(5, "Number", [6], title="Inside")
    document = saved("%Inside.seed%_%Box.seed%", node(6, "box", []))
    document["definitions"] = {"subgraphs": [{"id": "box", "name": "Box", "nodes": [inside], "links": []}]}
    assert prefix_of(document) == "6_%Box.seed%"


def test_a_primitives_text_is_expanded_and_notes_have_a_text() -> None:
    primitive = node(8, "PrimitiveNode", ["%Number.seed%_%P.value%_%Note.text%"], title="P")
    document = saved("x", primitive, node(9, "Note", ["hi"]), links=[[1, 8, 0, 3, 0, "STRING"]])
    document["nodes"][2]["inputs"] = [
        {"name": "filename_prefix", "link": 1, "widget": {"name": "filename_prefix"}}
    ]
    assert prefix_of(document) == "7_%Number.seed%_%P.value%_%Note.text%_hi"


def test_a_setting_is_expanded_in_the_prompt_and_kept_in_the_graph() -> None:
    found = apply_settings(
        Document(saved("x"), None), ["filename_prefix=%Number.seed%_f", "1.seed=9"], CLASSES
    )
    assert found.prompt and found.prompt["3"]["inputs"]["filename_prefix"] == "9_f"
    assert found.graph and found.graph["nodes"][2]["widgets_values"] == ["%Number.seed%_f"]


def test_a_setting_of_an_image_with_both_forms() -> None:
    document = saved("%Number.seed%_f")
    prompt = to_prompt(Document(document, None), CLASSES)
    found = apply_settings(Document(document, prompt), ["1.seed=9"], CLASSES)
    assert found.prompt and found.prompt["3"]["inputs"]["filename_prefix"] == "9_f"
    other = copy.deepcopy(prompt)
    other["3"]["inputs"]["filename_prefix"] = "another"
    found = apply_settings(Document(document, other), ["1.seed=9"], CLASSES)
    assert found.prompt and found.prompt["3"]["inputs"]["filename_prefix"] == "another"


def test_a_prompt_in_api_format_is_left_alone() -> None:
    prompt = {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "%date:yyyy%_%Number.seed%"}}}
    assert to_prompt(Document(None, prompt), CLASSES) == prompt


def test_a_prefix_cannot_leave_the_output_folder_through_a_widgets_value(tmp_path: Path) -> None:
    document = saved("%Blend.text%/%Blend.text%/x")
    document["nodes"][1]["widgets_values"][1] = ".."
    document["nodes"] = document["nodes"][1:3]
    prefix = prefix_of(document)
    assert prefix == "../../x"
    registry = Registry.of_pack(Folders.under(tmp_path / "data"))
    checked = registry.classes["SaveImage"]
    with context.using(registry.folders):
        assert "must stay in the folder output" in str(checked.VALIDATE_INPUTS(prefix))
