"""While a prompt runs in genuine ComfyUI: progress and previews, interruption, bad input."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from ..nodes import graphs
from .server import ComfyServer, PromptFailed

TEXT, PREVIEW = 3, 4
"""First number of the binary messages that carry progress text and previews with metadata."""


def messages(comfy: ComfyServer, prompt: graphs.Prompt) -> list[tuple[str, Any]]:
    """All that the websocket says during a run, as (type, data), binary ones as (number, bytes)."""

    async def listen() -> list[tuple[Any, Any]]:
        heard: list[tuple[Any, Any]] = []
        address = f"{comfy.url}/ws?clientId=listener"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            run = asyncio.create_task(asyncio.to_thread(comfy.run, prompt, "listener"))
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    heard.append((struct.unpack(">I", message.data[:4])[0], message.data[4:]))
                    continue
                event = json.loads(message.data)
                heard.append((event["type"], event["data"]))
                if event["type"] in ("execution_success", "execution_error"):
                    break
            await run
        return heard

    return asyncio.run(listen())


def saved(files: graphs.Prompt, **settings: Any) -> graphs.Prompt:
    prompt = graphs.text_to_image(files, **settings)
    return prompt | {"save": graphs.node("SaveImage", images=["decode", 0], filename_prefix="running")}


def test_progress_and_previews_of_our_sampler(comfy: ComfyServer, files: graphs.Prompt) -> None:
    heard = messages(comfy, saved(files, steps=6, seed=123))
    steps = [data["value"] for kind, data in heard if kind == "progress" and data["node"] == "sample"]
    assert steps[-1] == 6
    pictures = []
    for kind, data in heard:
        if kind == PREVIEW:
            length = struct.unpack(">I", data[:4])[0]
            assert json.loads(data[4 : 4 + length])["node_id"] == "sample"
            pictures.append(Image.open(io.BytesIO(data[4 + length :])))
    assert pictures and pictures[-1].size == (512, 384)  # a 64x48 picture, at ComfyUI's preview size


def test_a_prompt_that_is_cut_off_is_told_with_its_tokens(comfy: ComfyServer, files: graphs.Prompt) -> None:
    heard = messages(comfy, saved(files, prompt="a red circle " * 10, seed=124))
    told = " ".join(data.decode("utf-8", "replace") for kind, data in heard if kind == TEXT)
    assert "31 tokens" in told and "16" in told


def test_interrupt_stops_our_sampler(comfy: ComfyServer, files: graphs.Prompt) -> None:
    prompt = saved(files, steps=1000, solver="rk4", width=256, height=256, seed=125)
    caught: list[PromptFailed] = []

    def run() -> None:
        try:
            comfy.run(prompt)
        except PromptFailed as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while comfy.get("/api/prompt")["exec_info"]["queue_remaining"] == 0:
        time.sleep(0.05)
    while thread.is_alive():
        comfy.interrupt()
        time.sleep(0.2)
    assert "interrupted" in json.dumps(caught[0].details)


WRONG = [
    ("latent", graphs.node("EmptyHunyuanLatentVideo", width=64, height=48, length=5, batch_size=1), "decode",
     "a FLUX.1 latent has 16 channels, got a tensor of shape [1, 16, 2, 6, 8]"),
    ("vae", graphs.node("VAELoader", vae_name="pixel_space"), "decode", "got 3; connect Load FLUX VAE"),
    ("schedule", graphs.node("KarrasScheduler", steps=5, sigma_max=14.6, sigma_min=0.03, rho=7.0), "decode",
     "FLUX.1's sigmas lie between 0 and 1, got 14.6"),
    ("schedule", graphs.node("FlipSigmas", sigmas=["plan", 0]), "decode", "sigmas must descend"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "instead", "target", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_wires_are_refused_in_a_sentence(
    comfy: ComfyServer, files: graphs.Prompt, place: str, instead: graphs.Prompt, target: str, sentence: str
) -> None:
    prompt = saved(files, seed=126)
    prompt["plan"] = prompt["schedule"]
    prompt[place] = instead
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt)
    assert sentence in refused.value.details["exception_message"]


WRONG_FILES = [
    ("clip", {"clip_name": "tiny-t5.safetensors"}, "tiny-t5.safetensors is a T5 text encoder, not a CLIP"),
    ("clip", {"t5_name": "bare-clip.safetensors"}, "bare-clip.safetensors is a CLIP text encoder, not a T5"),
    ("vae", {"vae_name": "tiny.safetensors"}, "tiny.safetensors is a FLUX.1 transformer, not a VAE"),
]


@pytest.mark.parametrize(("place", "inputs", "sentence"), WRONG_FILES, ids=["swapped", "bare", "vae"])
def test_files_of_another_kind_are_refused_by_name(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, place: str, inputs: dict[str, str], sentence: str
) -> None:
    """Also where an encoder comes without its tokenizer and ComfyUI's own loader would take over."""
    models = base / "models"
    shutil.copy(
        models / "text_encoders" / "tiny-clip.safetensors", models / "text_encoders" / "bare-clip.safetensors"
    )
    shutil.copy(models / "diffusion_models" / "tiny.safetensors", models / "vae" / "tiny.safetensors")
    prompt = saved(files, seed=127)
    prompt[place] = {**prompt[place], "inputs": {**prompt[place]["inputs"], **inputs}}
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt)
    assert sentence in refused.value.details["exception_message"]


@pytest.mark.parametrize(
    ("node", "name", "value"), [("latent", "width", 100), ("schedule", "steps", 0), ("latent", "height", 8)]
)
def test_widgets_out_of_bounds_are_refused(
    comfy: ComfyServer, files: graphs.Prompt, node: str, name: str, value: int
) -> None:
    """ComfyUI checks bounds but not steps of 16: a width of 100 fails in the node, with our sentence."""
    prompt = saved(files)
    prompt[node]["inputs"][name] = value
    with pytest.raises(PromptFailed) as refused:
        comfy.run(prompt)
    assert name in json.dumps(refused.value.details)
