"""A text-to-image graph in the editor's format, as the editor saves it, over the tiny random models."""

from __future__ import annotations

from typing import Any

from ..nodes.tiny import NAMES

Graph = dict[str, Any]

# class, values by position ("fixed" follows every seed), {input: (node id, output slot)}
NODES: dict[int, tuple[str, list[Any], dict[str, tuple[int, int]]]] = {
    1: ("RectifluxModelLoader", [NAMES["diffusion_models"], "auto"], {}),
    2: ("RectifluxTextEncoderLoader", [NAMES["clip"], NAMES["t5"]], {}),
    3: ("RectifluxVAELoader", [NAMES["vae"]], {}),
    4: ("RectifluxTextEncode", ["a red circle", 3.5, ""], {"clip": (2, 0)}),
    5: ("RectifluxNegativePrompt", [""], {"clip": (2, 0)}),
    6: ("RectifluxEmptyLatent", [64, 48, 1], {}),
    7: ("RectifluxNoise", [7, "fixed"], {}),
    8: ("RectifluxSchedule", [2, 1.0, "by size", 1.15], {"latent": (6, 0)}),
    9: ("RectifluxSolver", ["euler"], {}),
    10: (
        "RectifluxSampler",
        [3.0],
        {
            "model": (1, 0),
            "positive": (4, 0),
            "noise": (7, 0),
            "sampler": (9, 0),
            "sigmas": (8, 0),
            "latent": (6, 0),
            "negative": (5, 0),
        },
    ),
    11: ("RectifluxVAEDecode", [], {"samples": (10, 0), "vae": (3, 0)}),
    12: ("SaveImage", ["image"], {"images": (11, 0)}),
}


def text_to_image() -> Graph:
    """A new copy of the graph."""
    nodes, links = [], []
    for number, (kind, values, wires) in NODES.items():
        inputs = []
        for name, (origin, slot) in wires.items():
            links.append([len(links) + 1, origin, slot, number, len(inputs), "*"])
            inputs.append({"name": name, "type": "*", "link": len(links)})
        node = {"id": number, "type": kind, "mode": 0, "inputs": inputs, "outputs": []}
        nodes.append({**node, "widgets_values": list(values), "properties": {}})
    return {"last_node_id": 12, "last_link_id": len(links), "nodes": nodes, "links": links, "version": 0.4}


def node_of(graph: Graph, number: int) -> Graph:
    return next(node for node in graph["nodes"] if node["id"] == number)
