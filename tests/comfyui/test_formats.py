"""Every format in genuine ComfyUI: the picture of the dense model, with LoRAs of any loader, and back."""

from __future__ import annotations

import random
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rectiflux.benchmarks.reference.quantized_files import write_gguf
from rectiflux.benchmarks.reference.text import llama_names
from rectiflux.flux_core.weights import read_state_dict
from safetensors.torch import save_file

from ..nodes import graphs
from ..nodes.model_files import all_in_one, pipeline, quantized_transformer
from ..nodes.tiny import NAMES, SPEC
from .conftest import DEV
from .pictures import k_sampler, largest_difference, our_graph, picture, psnr, same_to_rounding
from .server import ComfyServer, PromptFailed
from .test_lora import KNOWN, control, saved, with_lora

FORMS = ["fp8 e4m3fn", "scale_weight", "Q8_0", "Q4_K"]
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def stored(base: Path) -> dict[str, tuple[str, str]]:
    """Names of each form's file and of the dense file of the same numbers."""
    return {form: quantized_transformer(base / "models", form, DEV) for form in FORMS}


def painted_by(files: graphs.Prompt, name: str, **settings: Any) -> graphs.Prompt:
    prompt = our_graph(files, **settings)
    prompt["model"]["inputs"]["model_name"] = name
    return prompt


@each_form
def test_it_paints_what_the_dense_model_paints(
    comfy: ComfyServer, files: graphs.Prompt, stored: dict[str, tuple[str, str]], form: str
) -> None:
    """To the last bit: by our sampler and by ComfyUI's."""
    name, dense = stored[form]
    shown = picture(comfy, painted_by(files, name))
    assert np.array_equal(shown, picture(comfy, painted_by(files, dense)))
    assert psnr(shown, picture(comfy, our_graph(files))) < 60, "quantised numbers are others"
    stock = picture(comfy, k_sampler(painted_by(files, name)))
    assert np.array_equal(stock, picture(comfy, k_sampler(painted_by(files, dense))))


@each_form
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "LoraLoaderModelOnly"])
def test_a_lora_on_it_and_off_again(
    comfy: ComfyServer,
    base: Path,
    files: graphs.Prompt,
    stored: dict[str, tuple[str, str]],
    form: str,
    stock: bool,
) -> None:
    """As on the dense model, whose weights ComfyUI patches; afterwards not a bit is changed.

    A LoRA beside a layer and one merged into it are other sums: a level of 255 where a pixel is between two.
    """
    name, dense = stored[form]
    file = saved(base, "kohya", KNOWN["kohya"])
    before = picture(comfy, painted_by(files, name))
    strong = {"strength_model": 2.0}
    shown = picture(comfy, with_lora(painted_by(files, name), file, stock, **strong))
    expected = picture(comfy, with_lora(painted_by(files, dense), file, stock, **strong))
    assert same_to_rounding(shown, expected)
    assert psnr(shown, before) < 40
    assert np.array_equal(picture(comfy, painted_by(files, name)), before)
    other = picture(comfy, painted_by(files, name, seed=8))
    assert np.array_equal(other, picture(comfy, painted_by(files, dense, seed=8)))


@each_form
def test_a_lora_stays_from_run_to_run(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, stored: dict[str, tuple[str, str]], form: str
) -> None:
    """Of prompts that differ in the seed alone ComfyUI runs the sampler alone, on the MODEL that it has."""
    file, seeds = saved(base, "kohya", KNOWN["kohya"]), (8, 9, 10)
    shown, expected = (
        [
            picture(comfy, with_lora(painted_by(files, name, seed=seed), file, strength_model=2.0))
            for seed in seeds
        ]
        for name in stored[form]
    )
    assert all(map(same_to_rounding, shown, expected))
    bare = picture(comfy, painted_by(files, stored[form][0], seed=seeds[-1]))
    assert psnr(shown[-1], bare) < 40


@pytest.mark.slow
def test_nothing_is_left_of_what_was_painted_before(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, stored: dict[str, tuple[str, str]]
) -> None:
    """Models, strengths, samplers and seeds in any order: each picture is what a fresh ComfyUI paints."""
    file = saved(base, "kohya", KNOWN["kohya"])
    prompts = {}
    for name in (stored["Q8_0"][0], stored["scale_weight"][0], stored["Q8_0"][1]):
        for strength, seed in product((None, 2.0, -2.0), (7, 8)):
            plain = painted_by(files, name, seed=seed)
            for sampler, one in (("ours", plain), ("KSampler", k_sampler(plain, seed=seed))):
                with_it = one if strength is None else with_lora(one, file, strength_model=strength)
                prompts[name, strength, seed, sampler] = with_it
    fresh = {}
    for key, prompt in prompts.items():
        comfy.free()
        fresh[key] = picture(comfy, prompt)
    for (name, strength, *which), one in fresh.items():
        others = [fresh[(name, other, *which)] for other in (None, 2.0, -2.0) if other != strength]
        assert all(psnr(one, other) < 40 for other in others), "each strength is seen"
    rng, key = random.Random(0), next(iter(prompts))
    for _ in range(60):
        near = [other for other in prompts if other[0] == key[0]]  # as often as not of the same model
        key = rng.choice(near if rng.random() < 0.5 else list(prompts))
        assert same_to_rounding(picture(comfy, prompts[key]), fresh[key]), key


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind != "kohya"])
def test_every_kind_of_adapter(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, stored: dict[str, tuple[str, str]], kind: str
) -> None:
    name, dense = stored["Q8_0"]
    file = saved(base, f"known-{kind}", KNOWN[kind])
    shown = picture(comfy, with_lora(painted_by(files, name), file))
    assert same_to_rounding(shown, picture(comfy, with_lora(painted_by(files, dense), file)))
    assert psnr(shown, picture(comfy, painted_by(files, name))) < 40


def test_two_loras_and_a_control_lora(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, stored: dict[str, tuple[str, str]]
) -> None:
    """The control LoRA widens img_in. LoRAs are added beside stored layers and merged into dense ones."""
    first, second = saved(base, "first", KNOWN["kohya"]), saved(base, "second", KNOWN["diffusers"])
    wide = saved(base, "control", control(SPEC))
    name, dense = stored["scale_weight"]
    shown = []
    for file in (name, dense):
        prompt = with_lora(painted_by(files, file), first, stock=True)
        shown.append(picture(comfy, with_lora(with_lora(prompt, second), wide)))
    assert largest_difference(*shown) <= 1
    assert psnr(shown[0], picture(comfy, painted_by(files, name))) < 40


def test_after_unloading_it_is_the_same(
    comfy: ComfyServer, files: graphs.Prompt, stored: dict[str, tuple[str, str]]
) -> None:
    prompt = painted_by(files, stored["Q4_K"][0])
    before = picture(comfy, prompt)
    comfy.free()
    assert np.array_equal(picture(comfy, prompt), before)


def quantised_t5(models: Path) -> tuple[str, str]:
    """Names of T5 as GGUF Q8_0, and of the dense file of the same numbers."""
    folder = models / "text_encoders"
    state = read_state_dict(folder / NAMES["t5"])
    numbers = write_gguf(llama_names(state), folder / "q.gguf", "Q8_0", "t5encoder")
    dense = {name: t.contiguous() for name, t in zip(state, numbers.values(), strict=True)}
    save_file(dense, folder / "q.safetensors")
    shutil.copy(folder / "tiny-t5.tokenizer.json", folder / "q.tokenizer.json")
    return "q.gguf", "q.safetensors"


def test_a_quantised_t5_and_loras_on_it(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    """As the dense file of its numbers, with and without a LoRA by either loader, and for another text."""
    shown, again = [], []
    for name in quantised_t5(base / "models"):
        for kind, own in (("RectifluxLora", {"blocks": ""}), ("LoraLoader", {})):
            prompt = our_graph(files)
            encoders = {"clip_name": NAMES["clip"], "t5_name": name}
            prompt["clip"] = graphs.node("RectifluxTextEncoderLoader", **encoders)
            prompt["about"] = graphs.node("PreviewAny", source=["clip", 1])
            inputs = {"lora_name": NAMES["loras"], "strength_model": 0.0, "strength_clip": 2.0, **own}
            shown.append(picture(comfy, prompt))
            prompt["lora"] = graphs.node(kind, model=["model", 0], clip=["clip", 0], **inputs)
            prompt["positive"]["inputs"]["clip"] = ["lora", 1]
            shown.append(picture(comfy, prompt))
            prompt["positive"]["inputs"]["prompt"] = "two blue stars"
            again.append(picture(comfy, prompt))
            told = comfy.run(prompt)["about"]["text"][0].splitlines()[1]
            assert told.startswith("a T5 text encoder") and ("GGUF Q8_0" in told) == name.endswith("gguf")
    plain, patched = shown[::2], shown[1::2]
    assert all(np.array_equal(plain[0], other) for other in plain)
    assert all(largest_difference(patched[0], other) <= 1 for other in patched)
    assert largest_difference(plain[0], patched[0]) > 8
    assert all(largest_difference(again[0], other) <= 1 for other in again)


@pytest.mark.parametrize("write", [all_in_one, pipeline])
def test_a_checkpoint_is_its_parts(comfy: ComfyServer, base: Path, files: graphs.Prompt, write: Any) -> None:
    name = write(base / "models")
    prompt = our_graph(files, "schnell")
    expected = picture(comfy, prompt)
    prompt["all"] = graphs.node("RectifluxCheckpointLoader", checkpoint_name=name, weight_dtype="auto")
    for node in prompt.values():
        for field, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in ("model", "clip", "vae"):
                node["inputs"][field] = ["all", ("model", "clip", "vae").index(value[0])]
    assert np.array_equal(picture(comfy, prompt), expected)
    prompt["text"] = graphs.node("PreviewAny", source=["all", 3])
    variant = "FLUX.1 [schnell] in small (hidden size 256, 2 + 2 blocks), fp32, "
    assert comfy.run(prompt)["text"]["text"][0].startswith(variant)


def test_the_lists_in_comfyui(comfy: ComfyServer, base: Path, stored: dict[str, tuple[str, str]]) -> None:
    """GGUF files and folders are in ours, and not in those of ComfyUI's own loaders."""
    all_in_one(base / "models"), pipeline(base / "models")

    def listed(node: str, field: str) -> list[str]:
        return comfy.get(f"/api/object_info/{node}")[node]["input"]["required"][field][0]

    ours = listed("RectifluxModelLoader", "model_name")
    assert {stored["Q4_K"][0], stored["scale_weight"][0], NAMES["diffusion_models"]} <= set(ours)
    assert not any(name.endswith(".gguf") for name in listed("UNETLoader", "unet_name"))
    found = listed("RectifluxCheckpointLoader", "checkpoint_name")
    assert {"tiny/all.safetensors", "tiny-pipeline"} <= set(found)
    assert not any("one.safetensors" in name for name in found)


def test_names_that_are_not_in_a_list(comfy: ComfyServer, files: graphs.Prompt) -> None:
    for name, sentence in (("x.ckpt", "'x.ckpt' is a pickle"), ("x.gguf", "'x.gguf' is not in its list")):
        with pytest.raises(PromptFailed, match=sentence):
            picture(comfy, painted_by(files, name))
