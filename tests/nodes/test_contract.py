"""What every node must provide to its hosts and its users."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import rectiflux
from rectiflux import nodes
from rectiflux.host.files import Folders
from rectiflux.nodes import NODES

ROOT = Path(nodes.__file__).parent
WIRES = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "SIGMAS", "SAMPLER", "NOISE", "IMAGE", "MASK"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}
SHIPPED_IDS = {
    "RectifluxModelLoader": ["model_name", "weight_dtype", "memory_limit"],
    "RectifluxTextEncoderLoader": ["clip_name", "t5_name"],
    "RectifluxVAELoader": ["vae_name"],
    "RectifluxCheckpointLoader": ["checkpoint_name", "weight_dtype", "memory_limit"],
    "RectifluxLora": ["lora_name", "strength_model", "strength_clip", "blocks"],
    "RectifluxTextEncode": ["prompt", "guidance", "clip_prompt", "t5_length", "weights"],
    "RectifluxNegativePrompt": ["negative_prompt", "weights"],
    "RectifluxEmptyLatent": ["width", "height", "batch_size"],
    "RectifluxNoise": ["seed", "convention"],
    "RectifluxSchedule": ["steps", "denoise", "shift", "mu"],
    "RectifluxSolver": ["solver"],
    "RectifluxAdaptiveSolver": ["rtol", "atol", "max_evaluations"],
    "RectifluxStochasticSolver": ["eta"],
    "RectifluxStepCache": ["method", "threshold"],
    "RectifluxCompile": ["mode"],
    "RectifluxSampler": ["cfg_scale", "cfg_until"],
    "RectifluxVAEDecode": [],
    "RectifluxVAEEncode": [],
    "RectifluxKontextReference": ["method", "strength"],
    "RectifluxFill": [],
    "RectifluxPadForOutpaint": ["left", "top", "right", "bottom"],
    "RectifluxComposite": ["feather"],
    "RectifluxControlImage": [],
    "RectifluxCanny": ["low", "high"],
    "RectifluxSideBySide": ["labels"],
}
"""Ids and the order of their widgets, by which saved workflows find their values: only append."""

each_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.NODE_ID)


def inputs(node: type) -> dict[str, tuple]:
    types = node.INPUT_TYPES()
    assert set(types) <= {"required", "optional", "hidden"}
    return types["required"] | types.get("optional", {})


def is_widget(kind: object) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def test_ids_and_widget_orders_never_change() -> None:
    found = {
        node.NODE_ID: [name for name, spec in inputs(node).items() if is_widget(spec[0])] for node in NODES
    }
    assert found == SHIPPED_IDS


def test_the_pack_offers_all_nodes_and_its_web_folder() -> None:
    assert list(rectiflux.NODE_CLASS_MAPPINGS) == list(SHIPPED_IDS)
    assert set(rectiflux.NODE_DISPLAY_NAME_MAPPINGS) == set(SHIPPED_IDS)
    assert (ROOT.parent / rectiflux.WEB_DIRECTORY).is_dir()
    titles = list(rectiflux.NODE_DISPLAY_NAME_MAPPINGS.values())
    assert len(set(titles)) == len(titles)


@each_node
def test_attributes(node: type) -> None:
    assert node.NODE_ID.startswith("Rectiflux")
    assert node.CATEGORY.split("/")[0] == "Rectiflux"
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert set(node.RETURN_TYPES) <= WIRES | WIDGETS
    assert node.DESCRIPTION == node.__doc__ and node.DESCRIPTION.endswith(".")
    assert 20 <= len(node.DESCRIPTION) <= 200


ORDER = "NODE_ID TITLE CATEGORY RETURN_TYPES RETURN_NAMES FUNCTION DESCRIPTION".split()


def test_attributes_have_one_order() -> None:
    names = {node.__name__ for node in NODES}
    found = {}
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                found[node.name] = [ast.unparse(a.targets[0]) for a in node.body if isinstance(a, ast.Assign)]
    assert found.keys() == names
    assert all(order[: len(ORDER)] == ORDER for order in found.values())


@each_node
def test_inputs_are_the_functions_parameters(node: type) -> None:
    parameters = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
    del parameters["self"]
    assert list(parameters) == list(inputs(node))
    optional = node.INPUT_TYPES().get("optional", {})
    for name, parameter in parameters.items():
        assert (parameter.default is not inspect.Parameter.empty) == (name in optional), name


@each_node
def test_every_input_is_explained_and_every_default_is_allowed(node: type, embedded: Folders) -> None:
    for name, (kind, options) in inputs(node).items():
        assert 10 < len(options["tooltip"]) <= 160 and options["tooltip"].count(". ") <= 1, name
        if isinstance(kind, list):
            assert options.get("default", kind[0]) in kind, name
        elif kind in WIDGETS:
            default = options["default"]
            assert options.get("min", default) <= default <= options.get("max", default), name
        else:
            assert kind in WIRES, name


@each_node
def test_help_page_names_every_widget(node: type) -> None:
    page = (ROOT.parent / "web" / "docs" / node.NODE_ID / "en.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {node.TITLE}\n")
    for name, spec in inputs(node).items():
        if is_widget(spec[0]) and name not in ("vae_name", "negative_prompt", "seed", "solver"):
            assert name in page


def test_no_help_page_without_a_node() -> None:
    pages = {path.parent.name for path in (ROOT.parent / "web" / "docs").rglob("*.md")}
    assert pages == set(SHIPPED_IDS)
