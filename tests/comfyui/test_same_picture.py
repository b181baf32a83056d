"""A prompt gives the same picture in genuine ComfyUI and in the embedded host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.workflow import read_document, to_prompt

from ..nodes import graphs
from ..nodes.tiny import NAMES
from .conftest import to_pixels
from .pictures import largest_difference, stock_model
from .server import PACK, ComfyServer, PromptFailed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "heun", "batch_size": 2},
        {"solver": "rk4", "cfg_scale": 1.0, "steps": 3},
        {"solver": "midpoint", "denoise": 0.6, "shift": "none"},
        {"width": 96, "height": 32, "shift": "fixed", "mu": 0.8, "prompt": ""},
        {"solver": "heun_corrected"},
        {"solver": "ab3", "steps": 6},
        {"solver": "euler_ancestral", "batch_size": 2},
        {"cfg_until": 0.6, "cfg_scale": 5.0},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "defaults",
)
def test_same_prompt_same_picture(
    comfy: ComfyServer, files: graphs.Prompt, embedded: Folders, settings: dict[str, Any]
) -> None:
    """Within 1/255: both compute in float32, and differ by the rounding of (x - denoised) / sigma."""
    prompt = graphs.text_to_image(files, **settings)
    expected = to_pixels(graphs.run(prompt, "decode")[0])
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="same")
    assert expected.std() > 20  # a picture with contrast, not a flat one that would agree by itself
    assert largest_difference(comfy.pictures(prompt, "save"), expected) <= 1


@pytest.mark.parametrize("text", [{"t5_length": "prompt"}, {"model": ["model", 0]}], ids=["prompt", "auto"])
def test_the_same_length_of_text_and_convention_of_noise(
    comfy: ComfyServer, files: graphs.Prompt, embedded: Folders, text: dict[str, Any]
) -> None:
    prompt = graphs.text_to_image(files)
    usual = to_pixels(graphs.run(prompt, "decode")[0])
    prompt["positive"]["inputs"] |= text
    prompt["noise"]["inputs"]["convention"] = "reference"
    expected = to_pixels(graphs.run(prompt, "decode")[0])
    assert ("t5_length" in text) == (largest_difference(expected, usual) > 8)
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="length")
    assert largest_difference(comfy.pictures(prompt, "save"), expected) <= 1


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_step_cache_skips_the_same_steps(comfy: ComfyServer, embedded: Folders, cfg_scale: float) -> None:
    """With a miniature that ships, whose steps are alike. With guidance both prompts are one batch."""
    names = ["rectiflux-mini-dev", "rectiflux-mini-clip", "rectiflux-mini-t5", "rectiflux-mini-vae"]
    files = graphs.loaders(*(f"{name}.safetensors" for name in names))
    prompt = graphs.text_to_image(files, steps=16, cfg_scale=cfg_scale, width=128, height=128)
    prompt["cache"] = graphs.node("RectifluxStepCache", model=["model", 0], method="forecast", threshold=0.2)
    prompt["sample"]["inputs"]["model"] = ["cache", 0]
    done: dict[str, tuple[Any, ...]] = {}
    expected = to_pixels(graphs.run(prompt, "decode", done)[0])
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="cached")
    assert largest_difference(comfy.pictures(prompt, "save"), expected) <= 1
    del prompt["save"]
    prompt["text"] = graphs.node("PreviewAny", source=["sample", 1])
    prompt["noise"]["inputs"]["seed"] += 1  # or ComfyUI would hand out the first run's report
    graphs.run(prompt, "sample", done := {})
    told = comfy.run(prompt)["text"]["text"][0].splitlines()[3]
    assert told == done["sample"][1].splitlines()[3]
    assert int(told.split()[5]) >= 1 and told.endswith(" of 16 passes")


def test_the_step_cache_is_for_our_models(comfy: ComfyServer, files: graphs.Prompt) -> None:
    prompt = stock_model(graphs.text_to_image(files))
    prompt["cache"] = graphs.node("RectifluxStepCache", model=["model", 0], method="forecast", threshold=0.1)
    prompt["sample"]["inputs"]["model"] = ["cache", 0]
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="cached")
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt)
    message = refused.value.details["exception_message"]
    assert message.startswith("Step Cache needs a MODEL from Load FLUX Model, got one from another loader")


@pytest.mark.slow
def test_compiled_blocks_paint_the_same_picture(
    comfy: ComfyServer, files: graphs.Prompt, embedded: Folders
) -> None:
    """With a LoRA of ComfyUI's own loader before and one of ours behind; eager here."""
    prompt = graphs.text_to_image(files)
    ours = graphs.node(
        "RectifluxLora", lora_name=NAMES["loras"], strength_model=0.5, strength_clip=0.0, blocks=""
    )
    prompt["lora"], prompt["sample"]["inputs"]["model"] = ours, ["lora", 0]
    ours["inputs"]["model"] = ["model", 0]
    expected = to_pixels(graphs.run(prompt, "decode")[0])
    half = {"lora_name": NAMES["loras"], "strength_model": 0.25, "model": ["model", 0]}
    prompt["stock"] = graphs.node("LoraLoaderModelOnly", **half)
    prompt["compile"] = graphs.node("RectifluxCompile", model=["stock", 0])
    ours["inputs"] |= {"model": ["compile", 0], "strength_model": 0.25}
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="compiled")
    assert largest_difference(comfy.pictures(prompt, "save"), expected) <= 1


def test_compiling_is_for_our_models(comfy: ComfyServer, files: graphs.Prompt) -> None:
    prompt = stock_model(graphs.text_to_image(files))
    prompt["compile"] = graphs.node("RectifluxCompile", model=["model", 0])
    prompt["sample"]["inputs"]["model"] = ["compile", 0]
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="compiled")
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt)
    message = refused.value.details["exception_message"]
    assert message.startswith("Compile FLUX needs a MODEL from Load FLUX Model, got one from another loader")


def test_inpainting_keeps_to_the_mask_alike(
    comfy: ComfyServer, files: graphs.Prompt, embedded: Folders
) -> None:
    """A mask over the left half, with ComfyUI's mask nodes there and the same tensor here."""
    prompt = graphs.text_to_image(files, denoise=0.8, steps=5)
    prompt["start"] = graphs.node("RectifluxVAEEncode", image=["picture", 0], vae=["vae", 0])
    prompt["picture"] = graphs.node("EmptyImage", width=64, height=48, batch_size=1, color=0x3366CC)
    prompt["all"] = graphs.node("SolidMask", value=1.0, width=64, height=48)
    prompt["right"] = graphs.node("SolidMask", value=1.0, width=32, height=48)
    prompt["left"] = graphs.node(
        "MaskComposite", destination=["all", 0], source=["right", 0], x=32, y=0, operation="subtract"
    )
    prompt["masked"] = graphs.node("SetLatentNoiseMask", samples=["start", 0], mask=["left", 0])
    prompt["sample"]["inputs"]["latent"] = ["masked", 0]
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="mask")
    ours = comfy.pictures(prompt, "save")
    prompt["unmasked"] = graphs.node("RectifluxVAEDecode", samples=["start", 0], vae=["vae", 0])
    prompt["save"]["inputs"]["images"] = ["unmasked", 0]
    start = comfy.pictures(prompt, "save")
    assert largest_difference(ours[:, :, 48:], start[:, :, 48:]) < largest_difference(
        ours[:, :, :16], start[:, :, :16]
    )
    blue = torch.tensor([0x33, 0x66, 0xCC]) / 255
    done: dict[str, Any] = {"picture": (blue.expand(1, 48, 64, 3),)}
    left = torch.cat([torch.ones(1, 48, 32), torch.zeros(1, 48, 32)], dim=2)
    done["masked"] = ({**graphs.run(prompt, "start", done)[0], "noise_mask": left},)
    assert largest_difference(ours, to_pixels(graphs.run(prompt, "decode", done)[0])) <= 1


def test_the_shipped_workflow_gives_the_same_picture(comfy: ComfyServer, embedded: Folders) -> None:
    """The demo workflow file itself, with the miniature that ships with the pack."""
    info = Registry.of_pack(embedded).object_info()
    prompt = to_prompt(read_document(PACK / "workflows" / "text_to_image.json"), info)
    save = next(key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    expected = to_pixels(graphs.run(prompt, prompt[save]["inputs"]["images"][0])[0])
    assert expected.shape == (1, 128, 128, 3) and expected.std() > 20
    assert largest_difference(comfy.pictures(prompt, save), expected) <= 1
    comfy.free()  # unload everything, forget all results: it comes out the same again
    assert largest_difference(comfy.pictures(prompt, save), expected) <= 1
