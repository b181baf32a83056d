"""The node classes that prompts may use, and their description for the editor (`object_info`)."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from . import context
from .files import Folders
from .stock_nodes import NODES as STOCK

PACK_NAME = "rectiflux"
"""The pack's name in the editor, in paths (/extensions/rectiflux/) and on its nodes."""

log = logging.getLogger(__name__)
NodeClass = type[Any]


class Registry:
    """Node classes by id, with the folders that their file lists come from."""

    def __init__(self, classes: dict[str, NodeClass], titles: dict[str, str], folders: Folders) -> None:
        """Register the stock nodes and `classes`; as in ComfyUI, a stock node cannot be replaced."""
        self.classes = {**classes, **{node.NODE_ID: node for node in STOCK}}
        self.titles = {**titles, **{node.NODE_ID: node.TITLE for node in STOCK}}
        self.folders = folders

    @classmethod
    def of_pack(cls, folders: Folders) -> Registry:
        """A registry of this pack's nodes."""
        from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

        return cls(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, folders)

    def __contains__(self, class_type: str) -> bool:
        return class_type in self.classes

    def __getitem__(self, class_type: str) -> NodeClass:
        return self.classes[class_type]

    def title(self, class_type: str) -> str:
        """The title that the editor shows on the node."""
        return self.titles.get(class_type, class_type)

    def is_output(self, class_type: str) -> bool:
        """Whether a node of this class saves or shows something, so that a prompt may end in it."""
        return bool(getattr(self.classes[class_type], "OUTPUT_NODE", False))

    def inputs(self, class_type: str) -> dict[str, dict[str, Any]]:
        """INPUT_TYPES of a class, with current file lists."""
        with context.using(self.folders):
            return self.classes[class_type].INPUT_TYPES()

    def input_specs(self, class_type: str) -> dict[str, tuple[Any, dict[str, Any], bool]]:
        """{input: (type, options, required)}; the type of a combo is the list of its choices."""
        specs = {}
        for part, required in (("optional", False), ("required", True)):
            for name, spec in self.inputs(class_type).get(part, {}).items():
                kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
                specs[name] = (options.get("options", []) if kind == "COMBO" else kind, options, required)
        return specs

    def object_info(self) -> dict[str, dict[str, Any]]:
        """{id: description} of all node classes; a class whose INPUT_TYPES fails is left out."""
        table = {}
        for class_type in self.classes:
            try:
                table[class_type] = self.describe(class_type)
            except Exception:  # one broken node must not make the editor unusable
                log.exception("INPUT_TYPES of %s failed; the node is left out", class_type)
        return table

    def checked_by_node(self, class_type: str) -> set[str]:
        """Names of the inputs whose values the node checks itself, in its VALIDATE_INPUTS."""
        own_check = getattr(self.classes[class_type], "VALIDATE_INPUTS", None)
        return set(inspect.signature(own_check).parameters) if own_check else set()

    def describe(self, class_type: str) -> dict[str, Any]:
        """The entry of one class in `object_info`."""
        node, inputs = self.classes[class_type], self.inputs(class_type)
        outputs = list(node.RETURN_TYPES)
        described = {
            "input": inputs,
            "input_order": {part: list(names) for part, names in inputs.items()},
            "is_input_list": False,
            "output": outputs,
            "output_is_list": [False] * len(outputs),
            "output_name": list(getattr(node, "RETURN_NAMES", outputs)),
            "name": class_type,
            "display_name": self.title(class_type),
            "description": getattr(node, "DESCRIPTION", ""),
            "python_module": "nodes" if node in STOCK else f"custom_nodes.{PACK_NAME}",
            "category": getattr(node, "CATEGORY", ""),
            "output_node": self.is_output(class_type),
            "search_aliases": list(getattr(node, "SEARCH_ALIASES", [])),
            "checked_by_node": sorted(self.checked_by_node(class_type)),
        }
        for attribute in ("OUTPUT_TOOLTIPS", "DEPRECATED", "EXPERIMENTAL", "ESSENTIALS_CATEGORY"):
            if getattr(node, attribute, None):
                described[attribute.lower()] = getattr(node, attribute)
        return described
