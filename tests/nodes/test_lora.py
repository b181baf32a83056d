"""Load FLUX LoRA in the embedded host: its images, its report, and that its inputs stay as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders
from rectiflux.nodes import host_embedded_loading as loading
from rectiflux.nodes.host import current_host
from safetensors.torch import save_file

from . import graphs
from .tiny import NAMES, POOLED_WIDTH, TXT_WIDTH, lora_tensors

FILES = graphs.loaders(NAMES["diffusion_models"], NAMES["clip"], NAMES["t5"], NAMES["vae"])


def with_loras(*settings: dict[str, Any], files: graphs.Prompt = FILES) -> graphs.Prompt:
    """Our own nodes with Load FLUX LoRA once for each of the settings, one after the other."""
    prompt = graphs.text_to_image(files)
    model, clip = ["model", 0], ["clip", 0]
    for i, own in enumerate(settings):
        inputs = {
            "lora_name": NAMES["loras"],
            "strength_model": 0.8,
            "strength_clip": 0.6,
            "blocks": "",
            "model": model,
            "clip": clip,
            **own,
        }
        prompt[f"lora{i}"] = graphs.node("RectifluxLora", **inputs)
        model, clip = [f"lora{i}", 0], [f"lora{i}", 1]
    prompt["sample"]["inputs"]["model"] = model
    prompt["positive"]["inputs"]["clip"] = prompt["negative"]["inputs"]["clip"] = clip
    return prompt


def merged(strength_model: float, strength_clip: float) -> dict[str, tuple[Any, ...]]:
    """What the loaders give, with the tiny LoRA added to their weights by hand."""
    done: dict[str, tuple[Any, ...]] = {}
    with pytest.MonkeyPatch.context() as patched:
        # unpacked, so that the weights are parameters
        patched.setattr(loading, "pack_weights", lambda network, on_progress: 0)
        model, encoders = (graphs.run(dict(FILES), name, done)[0] for name in ("model", "clip"))
    tensors = lora_tensors()
    for parameters, front, strength in (
        (model.network.named_parameters(), "lora_unet_", strength_model),
        (encoders.clip.named_parameters(), "lora_te1_text_model_", strength_clip),
        (encoders.t5.named_parameters(), "lora_te3_", strength_clip),
    ):
        for name, parameter in parameters:
            name = name.removeprefix("text_model.").removesuffix(".weight")
            stem = front + name.replace(".", "_")
            if f"{stem}.alpha" in tensors and parameter.ndim == 2:
                change = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
                with torch.no_grad():
                    parameter += strength * 3.0 / 4.0 * change
    return done


def image(prompt: graphs.Prompt, done: dict[str, tuple[Any, ...]] | None = None) -> torch.Tensor:
    return graphs.run(prompt, "decode", done)[0]


def test_the_image_is_that_of_the_merged_weights(embedded: Folders) -> None:
    expected = image(graphs.text_to_image(FILES), merged(0.8, 0.6))
    torch.testing.assert_close(image(with_loras({})), expected, atol=2e-4, rtol=0)
    assert (image(graphs.text_to_image(FILES)) - expected).abs().max() > 0.05


def test_loras_in_a_row_stack(embedded: Folders) -> None:
    """Strengths of one file add up: 0.5 and 0.3 of the model, 0.4 and 0.2 of the encoders."""
    first = {"strength_model": 0.5, "strength_clip": 0.4}
    second = {"strength_model": 0.3, "strength_clip": 0.2}
    torch.testing.assert_close(image(with_loras(first, second)), image(with_loras({})), atol=2e-4, rtol=0)


def test_the_input_model_stays_as_it_is(embedded: Folders) -> None:
    done: dict[str, Any] = {}
    plain = image(graphs.text_to_image(FILES), done)
    model, clip = done["model"][0], done["clip"][0]
    bits = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    image(with_loras({}), {"model": done["model"], "clip": done["clip"], "vae": done["vae"]})
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.network.state_dict().items())
    again = {"model": (model,), "clip": (clip,), "vae": done["vae"]}
    assert torch.equal(image(graphs.text_to_image(FILES), again), plain)


def test_strength_0_and_blocks_at_0_are_the_plain_image(embedded: Folders) -> None:
    plain = image(graphs.text_to_image(FILES))
    assert torch.equal(image(with_loras({"strength_model": 0.0, "strength_clip": 0.0})), plain)
    assert torch.equal(image(with_loras({"blocks": "*=0", "strength_clip": 0.0})), plain)


def test_the_report_counts_with_and_without_the_encoders(embedded: Folders) -> None:
    prompt = with_loras({})
    layers = len(lora_tensors()) // 3
    assert graphs.run(prompt, "lora0")[2].splitlines() == [
        f"tiny-lora.safetensors: kohya; LoRA of rank 4 for {layers} layers",
        f"matched: {3 * layers} keys",
        "unmatched: 0 keys",
    ]
    del prompt["lora0"]["inputs"]["clip"]
    model, clip, report = graphs.run(prompt, "lora0")
    assert clip is None and isinstance(model, loading.EmbeddedModel)
    assert report.splitlines()[1:] == [
        f"matched: {3 * layers - 6} keys",
        "unmatched: 0 keys",
        "not connected: 3 keys for CLIP-L",
        "not connected: 3 keys for T5",
    ]


TEXT_ONLY = {key: tensor for key, tensor in lora_tensors().items() if key.startswith("lora_te")}
FOREIGN = {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(4, 320)}
WIDE = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072),
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(3072, 4),
}


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (FOREIGN, {}, "bad.safetensors is a LoRA for a Stable Diffusion UNet (SDXL or 1.5), not for FLUX.1"),
        (
            WIDE,
            {},
            "nothing in bad.safetensors fits this model: double_blocks.0.img_attn.qkv has a weight of",
        ),
        (
            TEXT_ONLY,
            {"clip": None},
            "bad.safetensors changes nothing of what is connected here, only CLIP-L and T5",
        ),
        (lora_tensors(), {"blocks": "nothing=1"}, "no layer's name starts with 'nothing'"),
    ],
)
def test_files_and_settings_that_do_not_fit(
    embedded: Folders,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    done: dict[str, Any] = {}
    model, clip = (graphs.run(dict(FILES), name, done)[0] for name in ("model", "clip"))
    with pytest.raises(ValueError, match=re.escape(message)):
        current_host().add_lora(model, settings.get("clip", clip), path, 1.0, 1.0, settings.get("blocks", ""))


def test_wires_of_another_kind_are_refused(embedded: Folders) -> None:
    path = current_host().model_path("loras", NAMES["loras"])
    with pytest.raises(TypeError, match="the MODEL must come from Load FLUX Model here, got str"):
        current_host().add_lora("x", None, path, 1.0, 1.0, "")
    model = graphs.run(dict(FILES), "model")[0]
    with pytest.raises(TypeError, match="the CLIP must come from Load FLUX Text Encoders here, got str"):
        current_host().add_lora(model, "x", path, 1.0, 1.0, "")


def test_a_missing_file_is_an_error_before_the_run(embedded: Folders) -> None:
    from rectiflux.nodes.lora import LoraLoader

    assert LoraLoader.VALIDATE_INPUTS(NAMES["loras"]) is True
    assert LoraLoader.VALIDATE_INPUTS("no.safetensors") == (
        "lora_name: 'no.safetensors' is not in its list, which has tiny-lora.safetensors"
    )


def test_the_tiny_lora_is_as_wide_as_the_tiny_encoders() -> None:
    """Otherwise the tests above would test less than they say."""
    widths = {t.shape[1] for key, t in TEXT_ONLY.items() if "down" in key}
    assert widths == {POOLED_WIDTH, TXT_WIDTH}


def test_alpha_in_the_metadata_is_used_and_reported(embedded: Folders) -> None:
    """Without its alpha tensors, 3 for rank 4, the file has scale 1, which metadata of alpha 3 mends."""
    folder = embedded.models[0] / "loras"
    bare = {key: tensor for key, tensor in lora_tensors().items() if not key.endswith(".alpha")}
    save_file(bare, folder / "bare.safetensors")
    save_file(bare, folder / "flat.safetensors", {"network_alpha": "3"})
    expected = image(with_loras({}))
    assert torch.equal(image(with_loras({"lora_name": "flat.safetensors"})), expected)
    assert not torch.equal(image(with_loras({"lora_name": "bare.safetensors"})), expected)
    report = graphs.run(with_loras({"lora_name": "flat.safetensors"}), "lora0")[2]
    assert re.search(r"^note: network_alpha 3 of the metadata used for \d+ layers", report, re.MULTILINE)


def test_nan_in_a_lora_names_its_file_and_strength_0_ignores_it(embedded: Folders) -> None:
    damaged = lora_tensors()
    damaged["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][0, 0] = float("nan")
    save_file(damaged, embedded.models[0] / "loras" / "nan-up.safetensors")
    with pytest.raises(ValueError, match=r"nan-up\.safetensors has NaN or inf in 1 of"):
        image(with_loras({"lora_name": "nan-up.safetensors"}))
    off = {"lora_name": "nan-up.safetensors", "strength_model": 0.0, "strength_clip": 0.0}
    assert torch.equal(image(with_loras(off)), image(graphs.text_to_image(FILES)))
