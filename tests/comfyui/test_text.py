"""Our CLIP in ComfyUI's text nodes, ComfyUI's CLIP in ours, and files saved of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..nodes.tiny import NAMES, random_weights
from .conftest import DEV, inside

AGREE = 80.0
"""dB between what two implementations of the same encoders give."""


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """CLIP-L's and T5-XXL's vocabularies with few and narrow layers; each node's table is printed."""
    folder = tmp_path_factory.mktemp("text")
    t5 = T5Config(
        vocab_size=32128,
        d_model=32,
        d_kv=16,
        num_heads=2,
        num_layers=3,
        d_ff=64,
        feed_forward_proj="gated-gelu",
    )
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        num_attention_heads=1,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=77,
    )
    with torch.device("meta"):
        models = {"clip": CLIPTextModel(clip), "t5": T5EncoderModel(t5)}
    for seed, (name, model) in enumerate(models.items(), 3):
        weights = random_weights(model, seed, 0.3)
        weights.pop("encoder.embed_tokens.weight", None)
        prefix = "text_model." if name == "clip" and "text_model.final_layer_norm.bias" not in weights else ""
        save_file({prefix + key: tensor for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    paths = [base / "models" / "diffusion_models" / DEV, base / "models" / "vae" / NAMES["vae"]]
    files = [folder / f"{name}.safetensors" for name in models]
    found = inside("inside_text.py", *files, *paths, folder)
    print("| node | effect on ComfyUI's CLIP, dB | ours to it, dB |\n|-|-|-|")
    for name, (effect, agreement) in found["nodes"].items():
        print(f"| {name} | {effect:.1f} | {agreement:.1f} |")
    return found


def test_text_nodes_on_our_clip_are_as_on_comfyuis(found: dict[str, Any]) -> None:
    """Weights, padding to 256, no truncation, layers and T5TokenizerOptions included."""
    assert {name: pair for name, pair in found["nodes"].items() if pair[1] < AGREE} == {}
    for name in ("CLIPSetLastLayer -2", "T5TokenizerOptions 300", "CLIPTextEncode 'a (red:1.4) fox'"):
        assert found["nodes"][name][0] < 60, "it changes the conditioning, so that ignoring it would show"


def test_stock_nodes_report_what_our_clip_ignores(found: dict[str, Any]) -> None:
    assert found["a long T5 prompt is read whole"]
    (notice,) = found["tags"]
    assert "<lora:x:0.8>" in notice


def test_our_text_nodes_give_the_embedded_editors_conditioning(found: dict[str, Any]) -> None:
    """With either CLIP, either `weights`, every length; and the same notices, sent once."""
    wrong = {
        case: row
        for case, row in found["texts"].items()
        if min(row[0], row[2]) < AGREE or not (row[1] and row[3])
    }
    assert wrong == {}


def test_literal_prompts_have_transformers_ids(found: dict[str, Any]) -> None:
    assert found["ids"]


def test_saved_files_are_read_back_by_both_loaders(found: dict[str, Any]) -> None:
    saved = dict(found["saved"])
    assert saved.pop("VAESave, names and values")
    assert {name: value for name, value in saved.items() if value < AGREE} == {}
