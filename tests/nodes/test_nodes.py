"""What the nodes do in the embedded host, on tiny random models."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rectiflux import flux_core
from rectiflux.flux_core.memory import tiling
from rectiflux.flux_core.model.autoencoder import to_model_space
from rectiflux.flux_core.pipeline import Models, text_to_image
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.nodes import NODE_CLASS_MAPPINGS
from rectiflux.nodes.host import current_host
from rectiflux.nodes.host_embedded import EmbeddedModel
from rectiflux.nodes.model_files import prefer
from rectiflux.nodes.wires import start_latent

from . import graphs
from .tiny import NAMES, TXT_LENGTH

FILES = graphs.loaders(NAMES["diffusion_models"], NAMES["clip"], NAMES["t5"], NAMES["vae"])


def call(class_type: str, **inputs: Any) -> Any:
    """The first output of one node."""
    kind = NODE_CLASS_MAPPINGS[class_type]
    return getattr(kind(), kind.FUNCTION)(**inputs)[0]


def latent(width: int = 64, height: int = 48, batch_size: int = 1) -> dict[str, Any]:
    return call("RectifluxEmptyLatent", width=width, height=height, batch_size=batch_size)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "heun", "batch_size": 2},
        {"cfg_scale": 1.0, "width": 32, "height": 32, "prompt": ""},
        {"cfg_until": 0.6},
    ],
    ids=str,
)
def test_nodes_and_library_give_the_same_image(embedded: Folders, settings: dict[str, Any]) -> None:
    """The chain of nodes computes flux_core's text_to_image, to the rounding of the latent's two scales."""
    done: dict[str, Any] = {}
    image = graphs.run(graphs.text_to_image(FILES, **settings), "decode", done)[0]
    models = Models(done["clip"][0], done["model"][0].network, done["vae"][0])
    request = {
        "prompt": "a red circle on white",
        "seed": 7,
        "steps": 4,
        "cfg_scale": 3.0,
        "width": 64,
        "height": 48,
    }
    expected = text_to_image(models, **{**request, **settings})
    assert image.dtype == torch.float32 and image.shape == (
        settings.get("batch_size", 1), settings.get("height", 48), settings.get("width", 64), 3
    )  # fmt: skip
    torch.testing.assert_close(image, (expected.permute(0, 2, 3, 1) + 1) / 2, atol=2e-5, rtol=0)


def test_image_to_image_returns_to_the_image_as_denoise_falls(embedded: Folders) -> None:
    done: dict[str, Any] = {"start": ({"samples": torch.randn(1, 16, 6, 8)},)}
    distances = []
    for denoise in (0.05, 0.5, 1.0):
        prompt = graphs.text_to_image(FILES, denoise=denoise)
        prompt["sample"]["inputs"]["latent"] = ["start", 0]
        result = graphs.run(prompt, "sample", {**done})[0]["samples"]
        distances.append(float((result - done["start"][0]["samples"]).norm()))
    assert distances[0] < distances[1] < distances[2]


def test_sampling_in_two_halves_is_sampling_once(embedded: Folders) -> None:
    """A path that stops early is continued by a second sampler without noise."""
    done: dict[str, Any] = {}
    prompt = graphs.text_to_image(FILES, steps=6)
    whole = graphs.run(prompt, "sample", done)[0]["samples"]
    sigmas = done["schedule"][0]

    class NoNoise:
        seed = 0

        def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
            return torch.zeros_like(latent["samples"])

    wires = {name: done[name][0] for name in ("model", "positive", "negative")}
    wires |= {"sampler": done["solver"][0], "cfg_scale": 3.0}
    first = call("RectifluxSampler", **wires, noise=done["noise"][0], latent=latent(), sigmas=sigmas[:4])
    second = call("RectifluxSampler", **wires, noise=NoNoise(), latent=first, sigmas=sigmas[3:])
    torch.testing.assert_close(second["samples"], whole, atol=1e-4, rtol=1e-4)


def test_masks_travel_with_the_latent_and_inputs_stay_untouched(embedded: Folders) -> None:
    done: dict[str, Any] = {}
    prompt = graphs.text_to_image(FILES)
    start = {"samples": torch.randn(1, 16, 6, 8), "noise_mask": torch.zeros(1, 48, 64), "batch_index": [0]}
    before = start["samples"].clone()
    prompt["sample"]["inputs"]["latent"] = ["start", 0]
    done["start"] = (start,)
    result = graphs.run(prompt, "sample", done)[0]
    assert set(result) == set(start) and result is not start
    assert torch.equal(start["samples"], before)
    torch.testing.assert_close(result["samples"], before, atol=1e-5, rtol=1e-5)  # all masked: nothing changes
    assert "guidance" not in done["negative"][0][0][1]


def test_encode_and_decode_use_the_editors_image_format(embedded: Folders) -> None:
    vae = call("RectifluxVAELoader", vae_name=NAMES["vae"])
    image = torch.rand(2, 32, 48, 4)
    encoded = call("RectifluxVAEEncode", image=image, vae=vae)["samples"]
    expected = vae.encode(image[..., :3].permute(0, 3, 1, 2) * 2 - 1)
    torch.testing.assert_close(encoded, expected)
    decoded = call("RectifluxVAEDecode", samples={"samples": encoded}, vae=vae)
    assert decoded.shape == (2, 32, 48, 3) and 0 <= decoded.min() and decoded.max() <= 1


def test_prompt_goes_to_both_encoders_unless_clip_has_its_own(embedded: Folders) -> None:
    clip = call("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])
    same = call("RectifluxTextEncode", clip=clip, prompt="a red circle", guidance=2.5)
    own = call(
        "RectifluxTextEncode", clip=clip, prompt="a red circle", guidance=2.5, clip_prompt="blue square"
    )
    other = call("RectifluxNegativePrompt", clip=clip, negative_prompt="blue square")
    assert torch.equal(own[0][0], same[0][0])
    assert torch.equal(own[0][1]["pooled_output"], other[0][1]["pooled_output"])
    assert not torch.equal(own[0][1]["pooled_output"], same[0][1]["pooled_output"])
    assert same[0][1]["guidance"] == 2.5 and "guidance" not in other[0][1]


def test_non_latin_text_is_encoded(embedded: Folders) -> None:
    clip = call("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])
    encoded = call("RectifluxTextEncode", clip=clip, prompt="красный круг 赤い円 🔴", guidance=3.5)
    assert encoded[0][0].shape[:2] == (1, TXT_LENGTH) and encoded[0][0].isfinite().all()


def test_noise_of_part_of_a_batch_is_that_part_of_the_noise() -> None:
    noise = call("RectifluxNoise", seed=11)
    whole = noise.generate_noise(latent(batch_size=4))
    part = noise.generate_noise({**latent(batch_size=2), "batch_index": [3, 1]})
    assert torch.equal(part, whole[[3, 1]])
    assert torch.equal(whole, torch.randn(4, 16, 6, 8, generator=torch.Generator().manual_seed(11)))


def test_noise_by_the_references_convention_is_drawn_in_bfloat16() -> None:
    noise = call("RectifluxNoise", seed=11, convention="reference").generate_noise(latent())
    expected = torch.randn(
        1, 16, 6, 8, generator=torch.Generator().manual_seed(11), dtype=torch.bfloat16
    ).float()
    assert torch.equal(noise, expected)


@pytest.mark.parametrize(("choice", "length"), [("auto", 16), ("512", 16), ("prompt", 4)])
def test_t5_reads_as_many_tokens_as_chosen(embedded: Folders, choice: str, length: int) -> None:
    """Never more than the encoders support; `prompt` is three words and the end token."""
    clip = call("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])
    encoded = call("RectifluxTextEncode", clip=clip, prompt="a red circle", guidance=3.5, t5_length=choice)
    expected = clip.encode_t5(clip.t5_ids(["a red circle"], length))
    assert encoded[0][0].shape[1] == length and torch.equal(encoded[0][0], expected)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [({"guidance_embed": True}, 512), ({}, 256), ({"guidance_embed": True, "in_channels": 384}, 128)],
    ids=["dev", "schnell", "fill"],
)
def test_the_connected_model_sets_the_number_of_tokens(sizes: dict[str, Any], length: int) -> None:
    model = EmbeddedModel(SimpleNamespace(spec=replace(flux_core.FLUX_SCHNELL, **sizes)))
    assert current_host().t5_length(model) == length


def test_schedule_counts_the_latents_tokens() -> None:
    sigmas = call(
        "RectifluxSchedule", latent=latent(1024, 512), steps=3, denoise=1.0, shift="by size", mu=0.0
    )
    assert torch.equal(sigmas, flux_core.make_sigmas(3, 64 * 32))


def listening(stop: bool = False) -> tuple[context.RunContext, list[Any]]:
    """A run, and the events that its nodes send to the editor."""
    events: list[Any] = []
    run = context.RunContext(
        "9",
        lambda node, value, total: events.append(("progress", value, total)),
        lambda node, text: events.append(("notice", text)),
        lambda node, make: events.append(("preview", tuple(make().shape), make().dtype)),
    )
    if stop:
        run.stop.set()
    return run, events


def test_an_image_too_large_for_the_memory_is_coded_in_strips_with_a_bar(
    embedded: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = call("RectifluxVAELoader", vae_name=NAMES["vae"]).double()  # so that rounding does not matter
    image = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(0))
    encoded = call("RectifluxVAEEncode", image=image, vae=vae)["samples"]
    decoded = call("RectifluxVAEDecode", samples={"samples": encoded}, vae=vae)
    need = tiling.activation_bytes(vae, 256, 256)
    monkeypatch.setattr(tiling, "CPU_LIMIT", need // 2)
    for name, inputs, expected in (
        ("RectifluxVAEEncode", {"image": image}, encoded),
        ("RectifluxVAEDecode", {"samples": {"samples": encoded}}, decoded),
    ):
        run, events = listening()
        with context.running(run):
            result = call(name, vae=vae, **inputs)
        result = result["samples"] if isinstance(result, dict) else result
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        shown = [event[1:] for event in events if event[0] == "progress"]
        assert len(shown) > 10 and shown == sorted(shown) and shown[-1] == (100, 100)
        with pytest.raises(context.Interrupted), context.running(listening(stop=True)[0]):
            call(name, vae=vae, **inputs)


def test_the_sampler_shows_progress_and_previews(embedded: Folders) -> None:
    run, events = listening()
    with context.running(run):
        graphs.run(graphs.text_to_image(FILES, steps=3), "sample")
    assert [event[1:] for event in events if event[0] == "progress"] == [(1, 3), (2, 3), (3, 3)]
    assert [event[1:] for event in events if event[0] == "preview"] == [((6, 8, 3), torch.uint8)] * 3


def test_a_stopped_run_ends_at_the_next_step(embedded: Folders) -> None:
    run, events = listening(stop=True)
    with context.running(run), pytest.raises(context.Interrupted):
        graphs.run(graphs.text_to_image(FILES, steps=3), "sample")
    assert not events


def test_a_prompt_that_is_cut_off_is_reported_with_its_tokens(embedded: Folders) -> None:
    clip = call("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])
    run, events = listening()
    with context.running(run):
        call("RectifluxTextEncode", clip=clip, prompt="a red circle " * 10, guidance=3.5)
    assert len(events) == 2
    assert "31 tokens" in events[0][1] and "16" in events[0][1]


def test_empty_latents_stay_zero_in_model_space() -> None:
    empty = torch.zeros(1, 16, 2, 2)
    assert torch.equal(start_latent(empty, to_model_space), empty)
    full = torch.ones(1, 16, 2, 2)
    assert torch.equal(start_latent(full, to_model_space), to_model_space(full))


def test_lists_have_the_users_files_first_and_every_file_once(embedded: Folders) -> None:
    assert current_host().list_models("vae")[0] == NAMES["vae"]
    names = current_host().list_models("text_encoders")
    assert len(set(names)) == len(names)
    assert prefer(names, "t5") == NAMES["t5"] and prefer(names, "clip") == NAMES["clip"]
    assert prefer([], "t5") is None
