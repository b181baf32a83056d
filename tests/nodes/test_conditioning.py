"""The text nodes in the embedded host: prompts are read literally unless `weights` says otherwise."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from rectiflux.flux_core.model.text_encoders import TextEncoders
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.nodes import NODE_CLASS_MAPPINGS

from .tiny import NAMES


def call(node: str, **inputs: Any) -> Any:
    kind = NODE_CLASS_MAPPINGS[node]
    return getattr(kind(), kind.FUNCTION)(**inputs)[0]


@pytest.fixture
def clip(embedded: Folders) -> TextEncoders:
    return call("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])


def encoded(notices: list[str], node: str = "RectifluxTextEncode", **inputs: Any) -> torch.Tensor:
    """The T5 vectors of a text node, whose notices are appended."""
    run = context.RunContext(
        "4", lambda *args: None, lambda node, text: notices.append(text), None, threading.Event()
    )
    with context.running(run):
        return call(node, **inputs)[0][0]


def test_weights(clip: TextEncoders) -> None:
    """An old workflow has no `weights`, which is literal; "(", ":" and "1.5" are words of their own."""
    notices: list[str] = []
    prompt = {"clip": clip, "prompt": "a (red:1.5) circle", "guidance": 3.5}
    old = encoded(notices, **prompt)
    assert torch.equal(old, encoded(notices, **prompt, weights="literal"))
    assert torch.equal(old, clip.encode_t5(clip.t5_ids(["a (red:1.5) circle"])))
    weighted = encoded([], **prompt, weights="comfy")
    assert torch.equal(weighted, clip.encode(["a (red:1.5) circle"], weights="comfy").txt)
    assert sum("weights" in notice and "(red:1.5)" in notice for notice in notices) == 2


@pytest.mark.parametrize(
    ("node", "name"), [("RectifluxTextEncode", "prompt"), ("RectifluxNegativePrompt", "negative_prompt")]
)
def test_notices_of_both_text_nodes(clip: TextEncoders, node: str, name: str) -> None:
    extra = {"guidance": 3.5} if name == "prompt" else {}
    notices: list[str] = []
    encoded(notices, node, clip=clip, **{name: "a red 红 <lora:x:0.8> BREAK BREAK"}, **extra)
    tags, unknown = notices
    assert "<lora:x:0.8>" in tags and tags.count("BREAK") == 1
    assert "T5" in unknown and "红" in unknown
    notices.clear()
    encoded(notices, node, clip=clip, **{name: "a red circle on white"}, **extra)
    assert notices == []
