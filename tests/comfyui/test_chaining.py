"""Our MODEL and VAE among ComfyUI's other nodes give what its own objects give on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.flux_core.model.transformer import FluxTransformer
from safetensors.torch import save_file
from torch import nn

from ..nodes import graphs
from ..nodes.tiny import SPEC, VAE_SPEC, random_weights, write_transformer
from .conftest import DEV, inside
from .server import ComfyServer, PromptFailed

AGREE, EFFECT = 80.0, 60.0
"""dB between our result and ComfyUI's, at least; and between ComfyUI's with and without the node, at most."""
WITHOUT_EFFECT = {"UNetSelfAttentionMultiply", "PatchModelAddDownscale"}
"""ComfyUI's FLUX reads nothing of what these nodes, made for UNets, attach."""
FAILING = {"FreeU", "FreeU_V2", "SelfAttentionGuidance", "ModelNoiseScale"}
"""ComfyUI's own FLUX cannot run with these."""


def write(path: Path, kind: type[nn.Module], spec: Any, seed: int) -> Path:
    with torch.device("meta"):
        network = kind(spec)
    save_file(random_weights(network, seed), path)
    return path


@pytest.fixture(scope="module")
def dev(base: Path) -> Path:
    return base / "models" / "diffusion_models" / DEV


@pytest.fixture(scope="module")
def chained(dev: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    other = tmp_path_factory.mktemp("other") / "other.safetensors"
    found = inside(
        "inside_chaining.py", dev, write(other, FluxTransformer, replace(SPEC, guidance_embed=True), 9)
    )
    print("| node | effect on ComfyUI's FLUX, dB | ours to it, dB |\n|-|-|-|")
    for name, values in found.items():
        if isinstance(values[0], float):
            print(f"| {name} | {values[0]:.1f} | {values[1]:.1f} |")
    return found


@pytest.mark.slow
def test_every_node_does_to_our_model_what_it_does_to_comfyuis(chained: dict[str, Any]) -> None:
    numbers = {name: values for name, values in chained.items() if isinstance(values[0], float)}
    assert len(numbers) >= 45
    assert {name: agreement for name, (_, agreement) in numbers.items() if agreement < AGREE} == {}
    assert {name for name, (effect, _) in numbers.items() if effect > EFFECT} <= WITHOUT_EFFECT


@pytest.mark.slow
def test_nodes_that_fail_on_comfyuis_flux_fail_on_ours(chained: dict[str, Any]) -> None:
    texts = {name: values for name, values in chained.items() if isinstance(values[0], str)}
    assert set(texts) == FAILING
    assert all(theirs and ours for theirs, ours in texts.values())


@pytest.mark.slow
def test_the_compute_dtype_takes_effect(chained: dict[str, Any]) -> None:
    """In 16 bits both round, each in its own order: ours is as near to float32 as ComfyUI's, within 3 dB."""
    theirs, ours = chained["compute dtypes"]
    assert min(ours["fp32"], ours["default"]) >= AGREE
    for dtype in ("bf16", "fp16"):
        assert theirs[dtype] - 3 < ours[dtype] < AGREE


@pytest.fixture(scope="module")
def edges(dev: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("edges")
    fill = replace(SPEC, guidance_embed=True, in_channels=384)
    write_transformer(folder / "fill.safetensors", fill)
    vae = write(folder / "vae.safetensors", AutoEncoder, replace(VAE_SPEC, ch=32), 2)
    return inside("inside_latents.py", dev, folder / "fill.safetensors", vae)


def test_images_and_latents_of_odd_sizes_in_our_vae(edges: dict[str, Any]) -> None:
    """136 x 120 loses no line; of 139 x 125 the log names what is cropped."""
    found = dict(edges["vaes"])
    assert found.pop("shape") == [2, 16, 15, 17]
    agreement, message = found.pop("cropped")
    assert agreement >= AGREE and "139x125 was cropped to 136x120" in message
    assert set(found) > {"VAEEncode", "VAEDecodeTiled", "our decode"} and min(found.values()) >= AGREE


def test_inpainting_with_a_fill_model_at_an_odd_size(edges: dict[str, Any]) -> None:
    effect, agreement = edges["InpaintModelConditioning"]
    assert effect < EFFECT and agreement >= AGREE


def test_schedules_with_nothing_left(edges: dict[str, Any]) -> None:
    """Our sampler returns the latent, our solver what ComfyUI's euler returns."""
    found = dict(edges["ends"])
    assert found.pop("our solver on an odd latent") >= AGREE
    assert {name: length for name, (length, _, _) in found.items()} == {
        "last": 1,
        "beyond": 0,
        "first": 1,
        "denoise 0": 1,
    }
    assert all(same and as_theirs for _, same, as_theirs in found.values())


def test_empty_latents_of_other_models(edges: dict[str, Any]) -> None:
    assert edges["empty"] == {"EmptyLatentImage": True, "EmptySD3LatentImage": True}


def test_every_scheduler_of_comfyui_fits_our_sampler(edges: dict[str, Any]) -> None:
    """But one: its only sigma beside 0 is NaN, for any model."""
    assert list(edges["schedules"]) == ["kl_optimal, 1"]


def refused(comfy: ComfyServer, prompt: graphs.Prompt, node: str, **inputs: Any) -> str:
    """What ComfyUI says about a node's inputs before anything runs."""
    changed = graphs.node(prompt[node]["class_type"], **{**prompt[node]["inputs"], **inputs})
    save = graphs.node("SaveImage", images=["decode", 0], filename_prefix="edge")
    with pytest.raises(PromptFailed) as caught:
        comfy.run({**prompt, node: changed, "save": save})
    (error,) = {entry["details"] for entry in caught.value.details["node_errors"][node]["errors"]} or {""}
    return error


def test_sizes_and_seeds_in_the_words_of_our_own_host(comfy: ComfyServer, files: graphs.Prompt) -> None:
    prompt = graphs.text_to_image(files, width=64, height=128)
    options = comfy.get("/api/object_info/RectifluxNoise")["RectifluxNoise"]["input"]["required"]["seed"][1]
    assert options["max"] == 9007199254740991
    said = refused(comfy, prompt, "noise", seed=2**64)
    assert "got 18446744073709551616; choose one up to 9007199254740991" in said
    assert "got -1" in refused(comfy, prompt, "noise", seed=-1)
    assert "got 100000000000000000000" in refused(comfy, prompt, "noise", seed=1e20)


@pytest.mark.parametrize("seed", [2**53 - 1, 2**53 + 1, "6687881544318117707", 2**64 - 1])
def test_large_seeds_run(comfy: ComfyServer, files: graphs.Prompt, seed: int | str) -> None:
    prompt = graphs.text_to_image(files, width=16, height=16, steps=1, cfg_scale=1.0)
    prompt["noise"]["inputs"]["seed"] = seed
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="seed")
    (image,) = comfy.run(prompt)["save"]["images"]
    assert str(seed).encode() in comfy.fetch(f"/api/view?filename={image['filename']}&type=output")
