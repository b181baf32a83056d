"""Load FLUX LoRA in ComfyUI: the picture of the stock loader, on our model and on stock ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rectiflux.flux_core.model.spec import FluxSpec
from safetensors.torch import save_file
from torch import Tensor

from ..nodes import graphs
from ..nodes.tiny import NAMES, SPEC, lora_tensors
from .pictures import our_graph, picture, psnr, stock_model
from .server import ComfyServer, PromptFailed

HIDDEN = SPEC.hidden_size
QKV, MLP = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"
WIDTHS = {QKV: (3 * HIDDEN, HIDDEN), MLP: (HIDDEN, 5 * HIDDEN)}


def draw(seed: int, *shape: int, scale: float = 0.2) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lokr(rows: int, width: int) -> dict[str, Tensor]:
    second = draw(2, rows // 16, 4), draw(3, 4, width // 16)
    return {
        "lokr_w1": draw(1, 16, 16),
        "lokr_w2_a": second[0],
        "lokr_w2_b": second[1],
        "alpha": torch.tensor(3.0),
    }


def loha(rows: int, width: int) -> dict[str, Tensor]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((rows, 3), (3, width), (rows, 3), (3, width))
    return {
        name: draw(i, *shape, scale=0.5) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def dora(rows: int, width: int) -> dict[str, Tensor]:
    """By columns, where ComfyUI, LyCORIS and the paper agree."""
    lora = {"lora_down.weight": draw(1, 4, width), "lora_up.weight": draw(2, rows, 4)}
    return lora | {"dora_scale": 1 + draw(3, 1, width).abs(), "alpha": torch.tensor(2.0)}


def oft(rows: int, width: int) -> dict[str, Tensor]:
    return {"oft_blocks": draw(1, 16, rows // 16, rows // 16, scale=0.05), "alpha": torch.tensor(0.0)}


def full(rows: int, width: int) -> dict[str, Tensor]:
    return {"diff": draw(1, rows, width, scale=0.05), "diff_b": draw(2, rows)}


def generic(kind: Any) -> dict[str, Tensor]:
    """An adapter of one kind on two layers, under the names that every loader knows."""
    return {
        f"diffusion_model.{module}.{role}": tensor
        for module, sizes in WIDTHS.items()
        for role, tensor in kind(*sizes).items()
    }


def diffusers_named() -> dict[str, Tensor]:
    """Pieces of fused layers, and the last modulation, whose halves are swapped."""
    layers = {
        "transformer_blocks.0.attn.to_k": (HIDDEN, HIDDEN),
        "transformer_blocks.1.attn.add_v_proj": (HIDDEN, HIDDEN),
        "single_transformer_blocks.1.proj_mlp": (4 * HIDDEN, HIDDEN),
        "norm_out.linear": (2 * HIDDEN, HIDDEN),
    }
    tensors = {}
    for i, (name, (rows, width)) in enumerate(layers.items()):
        tensors[f"transformer.{name}.lora_A.weight"] = draw(i, 4, width)
        tensors[f"transformer.{name}.lora_B.weight"] = draw(i + 9, rows, 4)
    return tensors


KNOWN = {
    "kohya": {key: tensor for key, tensor in lora_tensors().items() if key.startswith("lora_unet")},
    "diffusers": diffusers_named(),
    "LoKr": generic(lokr),
    "LoHa": generic(loha),
    "DoRA": generic(dora),
    "OFT": generic(oft),
    "full": generic(full),
}
"""Files that ComfyUI's own loader reads too."""


def saved(base: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    file, folder = f"{name}.safetensors", base / "models" / "loras"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata)
    return file


def with_lora(prompt: graphs.Prompt, file: str, stock: bool = False, **settings: Any) -> graphs.Prompt:
    """The prompt with a LoRA on its model, by our loader or by ComfyUI's."""
    inputs = {"model": prompt["sample"]["inputs"]["model"], "lora_name": file, "strength_model": 0.7}
    if not stock:
        inputs |= {"strength_clip": 0.7, "blocks": ""}
    name = f"lora{len(prompt)}"
    kind = "LoraLoaderModelOnly" if stock else "RectifluxLora"
    sample = {**prompt["sample"], "inputs": {**prompt["sample"]["inputs"], "model": [name, 0]}}
    return prompt | {name: graphs.node(kind, **(inputs | settings)), "sample": sample}


@pytest.mark.parametrize("name", KNOWN)
def test_the_picture_is_the_stock_loaders(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, name: str
) -> None:
    """To the last bit, on our model and on ComfyUI's own."""
    file, plain = saved(base, f"known-{name}", KNOWN[name]), our_graph(files)
    for prompt in (plain, stock_model(plain)):
        ours = picture(comfy, with_lora(prompt, file))
        assert np.array_equal(ours, picture(comfy, with_lora(prompt, file, stock=True)))
        assert psnr(ours, picture(comfy, prompt)) < 40


BLOCKS = {
    f"lora_unet_double_blocks_{i}_{stream}_attn_": (i, stream) for i in (0, 1) for stream in ("img", "txt")
}
ATTENTION = {key: tensor for key, tensor in KNOWN["kohya"].items() if any(key.startswith(b) for b in BLOCKS)}
UNKNOWN = {
    "BFL without a prefix": {
        key.replace(old, f"double_blocks.{i}.{stream}_attn."): tensor
        for old, (i, stream) in BLOCKS.items()
        for key, tensor in ATTENTION.items()
        if key.startswith(old)
    },
    "base_model.model": {
        key.replace(old, f"base_model.model.double_blocks.{i}.{stream}_attn."): tensor
        for old, (i, stream) in BLOCKS.items()
        for key, tensor in ATTENTION.items()
        if key.startswith(old)
    },
}
"""The same numbers under names that ComfyUI's own loader does not know."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_file_that_the_stock_loader_does_not_know(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, name: str
) -> None:
    known, unknown = saved(base, "attention", ATTENTION), saved(base, "unknown", UNKNOWN[name])
    assert len(UNKNOWN[name]) == len(ATTENTION) == 24
    plain = our_graph(files)
    expected = picture(comfy, with_lora(plain, known, stock=True))
    assert np.array_equal(picture(comfy, with_lora(plain, unknown)), expected)
    assert np.array_equal(picture(comfy, with_lora(plain, unknown, stock=True)), picture(comfy, plain))


def test_it_stacks_with_the_stock_loader(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    first, second = saved(base, "first", KNOWN["kohya"]), saved(base, "second", KNOWN["diffusers"])
    plain = our_graph(files)
    both = with_lora(with_lora(plain, first, stock=True), second, stock=True)
    mixed = with_lora(with_lora(plain, first, stock=True), second)
    assert np.array_equal(picture(comfy, mixed), picture(comfy, both))
    other = with_lora(with_lora(plain, first), second, stock=True)
    assert np.array_equal(picture(comfy, other), picture(comfy, both))


def test_blocks_at_0_and_strength_0_are_the_plain_picture(
    comfy: ComfyServer, base: Path, files: graphs.Prompt
) -> None:
    file, plain = saved(base, "kohya", KNOWN["kohya"]), our_graph(files)
    expected = picture(comfy, plain)
    assert np.array_equal(picture(comfy, with_lora(plain, file, blocks="*=0")), expected)
    assert np.array_equal(picture(comfy, with_lora(plain, file, strength_model=0.0)), expected)
    doubled = with_lora(plain, file, strength_model=0.35, blocks="*=2")
    assert np.array_equal(picture(comfy, doubled), picture(comfy, with_lora(plain, file)))


def test_the_text_encoders_are_changed_as_by_the_stock_loader(
    comfy: ComfyServer, base: Path, files: graphs.Prompt
) -> None:
    shown = []
    for kind, own in (("RectifluxLora", {"blocks": ""}), ("LoraLoader", {})):
        prompt = our_graph(files)
        inputs = {"lora_name": NAMES["loras"], "strength_model": 0.7, "strength_clip": 1.5, **own}
        prompt["lora"] = graphs.node(kind, model=["model", 0], clip=["clip", 0], **inputs)
        prompt["sample"]["inputs"]["model"] = ["lora", 0]
        prompt["positive"]["inputs"]["clip"] = prompt["negative"]["inputs"]["clip"] = ["lora", 1]
        shown.append(picture(comfy, prompt))
    assert np.array_equal(*shown)
    model_only = with_lora(our_graph(files), NAMES["loras"], stock=True)
    assert not np.array_equal(shown[0], picture(comfy, model_only))


def control(spec: FluxSpec) -> dict[str, Tensor]:
    """A control LoRA as Black Forest Labs write it: img_in twice as wide, biases, norms given whole."""
    tensors = {
        "img_in.lora_A.weight": draw(1, 4, 2 * spec.in_channels),
        "img_in.lora_B.weight": draw(2, HIDDEN, 4),
    }
    for i in range(spec.depth_single):
        for j, norm in enumerate(("query_norm", "key_norm")):
            tensors[f"single_blocks.{i}.norm.{norm}.scale"] = 1 + draw(10 + 2 * i + j, spec.head_dim)
    for i, (module, (rows, width)) in enumerate(WIDTHS.items()):
        tensors[f"{module}.lora_A.weight"] = draw(20 + i, 4, width)
        tensors[f"{module}.lora_B.weight"] = draw(30 + i, rows, 4)
        tensors[f"{module}.lora_B.bias"] = draw(40 + i, rows)
    return tensors


def test_a_control_lora_is_applied_whole_and_beside_another(
    comfy: ComfyServer, base: Path, files: graphs.Prompt
) -> None:
    """On ComfyUI's network it is the stock loader's picture; on ours the same but for the networks."""
    file, plain = saved(base, "control", control(SPEC)), our_graph(files)
    stock = picture(comfy, with_lora(stock_model(plain), file, stock=True))
    assert np.array_equal(picture(comfy, with_lora(stock_model(plain), file)), stock)
    assert psnr(picture(comfy, with_lora(plain, file)), stock) >= 40
    style = saved(base, "kohya", KNOWN["kohya"])
    both = with_lora(with_lora(plain, file), style)
    expected = with_lora(with_lora(stock_model(plain), file, stock=True), style, stock=True)
    assert psnr(picture(comfy, both), picture(comfy, expected)) >= 40


def test_a_control_lora_and_one_that_changes_img_in_too(
    comfy: ComfyServer, base: Path, files: graphs.Prompt
) -> None:
    """In either order, on both networks; ComfyUI's own loader takes the control LoRA last alone."""
    tensors = {
        "lora_unet_img_in.lora_down.weight": draw(50, 4, 64),
        "lora_unet_img_in.lora_up.weight": draw(51, HIDDEN, 4),
    }
    first, second = saved(base, "control", control(SPEC)), saved(base, "image", tensors)
    plain = our_graph(files)
    for prompt in (plain, stock_model(plain)):
        expected = picture(comfy, with_lora(with_lora(prompt, second, stock=True), first))
        shown = picture(comfy, with_lora(with_lora(prompt, first), second))
        assert psnr(shown, expected) >= 60
        assert psnr(shown, picture(comfy, with_lora(prompt, first))) < 40


def test_the_report_and_the_refusals(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    prompt = our_graph(files)
    strange = {"lora_unet_double_blocks_0_nothing.lora_down.weight": torch.zeros(1, 1)}
    prompt["lora"] = graphs.node(
        "RectifluxLora",
        model=["model", 0],
        lora_name=saved(base, "counted", KNOWN["kohya"] | strange),
        strength_model=1.0,
        strength_clip=1.0,
        blocks="",
    )
    prompt["text"] = graphs.node("PreviewAny", source=["lora", 2])
    assert comfy.run(prompt)["text"]["text"][0].splitlines() == [
        "counted.safetensors: kohya; LoRA of rank 4 for 26 layers",
        "matched: 78 keys",
        "unmatched: 1 keys: lora_unet_double_blocks_0_nothing.lora_down.weight",
    ]
    foreign = {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(4, 320)}
    prompt["lora"]["inputs"]["lora_name"] = saved(base, "foreign", foreign)
    with pytest.raises(PromptFailed, match="foreign.safetensors is a LoRA for a Stable Diffusion UNet"):
        comfy.run(prompt)


def test_alpha_in_the_metadata(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    """The stock loader ignores it, so that its own image is that of scale 1."""
    bare = {key: tensor for key, tensor in KNOWN["kohya"].items() if not key.endswith(".alpha")}
    plain = our_graph(files)
    expected = picture(comfy, with_lora(plain, saved(base, "tensors", KNOWN["kohya"])))
    for metadata in ({"network_alpha": "3"}, {"lora_adapter_metadata": '{"transformer.lora_alpha": 3}'}):
        file = saved(base, f"alpha-{len(metadata)}-{'network_alpha' in metadata}", bare, metadata)
        assert np.array_equal(picture(comfy, with_lora(plain, file)), expected)
        assert not np.array_equal(picture(comfy, with_lora(plain, file, stock=True)), expected)


def test_nan_in_a_lora_names_its_file(comfy: ComfyServer, base: Path, files: graphs.Prompt) -> None:
    damaged = {key: tensor.clone() for key, tensor in KNOWN["kohya"].items()}
    damaged["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][0, 0] = float("nan")
    file, plain = saved(base, "nan-up", damaged), our_graph(files)
    for prompt in (plain, stock_model(plain)):
        with pytest.raises(PromptFailed, match=r"nan-up\.safetensors has NaN or inf in 1 of"):
            picture(comfy, with_lora(prompt, file))
        expected = picture(comfy, prompt)
        assert np.array_equal(picture(comfy, with_lora(prompt, file, strength_model=0.0)), expected)
