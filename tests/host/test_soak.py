"""The memory of `run.py serve` stays bounded over prompts with changing models, sizes, LoRAs and seeds.

RECTIFLUX_SOAK=700 sets how many prompts and RECTIFLUX_FUZZ_SEED which; the suite runs a few dozen.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from safetensors.torch import save_file

from ..nodes.tiny import NAMES, WORDS, lora_tensors, write_models
from .command import PATIENCE, serving

PROMPTS = int(os.environ.get("RECTIFLUX_SOAK", "40"))
SEED = int(os.environ.get("RECTIFLUX_FUZZ_SEED", "1"))
WARM_UP = 0.5
"""Part of the prompts after which the memory may no longer grow."""
LORAS = 4
GROWTH = 1.05

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def prompt(files: dict[str, str], dtype: str, loras: list[str], side: tuple[int, int], seed: int) -> Any:
    """Text to image with these files and LoRAs, in one step."""
    wires = {"model": ["model", 0], "clip": ["clip", 0]}
    nodes = {
        "model": node("RectifluxModelLoader", model_name=files["diffusion_models"], weight_dtype=dtype),
        "clip": node("RectifluxTextEncoderLoader", clip_name=files["clip"], t5_name=files["t5"]),
        "vae": node("RectifluxVAELoader", vae_name=files["vae"]),
    }
    for i, name in enumerate(loras):
        strengths = {"strength_model": 0.5, "strength_clip": 0.5, "blocks": ""}
        nodes[f"lora {i}"] = node("RectifluxLora", lora_name=name, **strengths, **wires)
        wires = {"model": [f"lora {i}", 0], "clip": [f"lora {i}", 1]}
    words = " ".join(random.Random(seed).choices(WORDS, k=6))
    plan = {"steps": 1, "denoise": 1.0, "shift": "by size", "mu": 1.15}
    sampled = {"positive": ["text", 0], "noise": ["noise", 0], "sampler": ["solver", 0]}
    sampled |= {"model": wires["model"], "sigmas": ["plan", 0], "latent": ["latent", 0], "cfg_scale": 1.0}
    return nodes | {
        "text": node("RectifluxTextEncode", clip=wires["clip"], prompt=words, guidance=3.5),
        "latent": node("RectifluxEmptyLatent", width=side[0], height=side[1], batch_size=1),
        "noise": node("RectifluxNoise", seed=seed),
        "plan": node("RectifluxSchedule", latent=["latent", 0], **plan),
        "solver": node("RectifluxSolver", solver="euler"),
        "sample": node("RectifluxSampler", **sampled),
        "decode": node("RectifluxVAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "show": node("PreviewImage", images=["decode", 0]),
    }


def drawn(rng: random.Random) -> Any:
    """A prompt of one of many kinds."""
    side = (16 * rng.randrange(4, 11), 16 * rng.randrange(4, 11))
    dtype = rng.choice(["auto", "bf16"])
    if rng.random() < 0.5:
        loras = [f"{rng.randrange(LORAS)}.safetensors" for _ in range(rng.randrange(3))]
        return prompt(NAMES, dtype, loras, side, rng.randrange(1 << 32))
    mini = {kind: f"rectiflux-mini-{kind}.safetensors" for kind in ("clip", "t5", "vae")}
    mini["diffusion_models"] = f"rectiflux-mini-{rng.choice(['dev', 'pro', 'schnell'])}.safetensors"
    return prompt(mini, dtype, [], side, rng.randrange(1 << 32))


def run(address: str, graph: Any) -> None:
    """Run a prompt in the editor to its end."""
    with urlopen(
        Request(f"{address}prompt", json.dumps({"prompt": graph}).encode()), timeout=PATIENCE
    ) as answer:
        job = json.loads(answer.read())["prompt_id"]
    deadline = time.monotonic() + PATIENCE
    while True:
        with urlopen(f"{address}api/jobs/{job}", timeout=PATIENCE) as answer:
            found = json.loads(answer.read())
        if found["status"] not in ("pending", "in_progress"):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    assert found["status"] == "completed", found


def own_memory(process: int) -> int:
    """Kilobytes of a process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1])


def test_memory_does_not_grow_with_changing_models_sizes_and_loras(tmp_path: Path) -> None:
    """After every fifth prompt the same one runs, so that what the cache holds is the same when measured."""
    models = write_models(tmp_path / "models")
    for i in range(LORAS):
        save_file(lora_tensors(seed=i), models / "loras" / f"{i}.safetensors")
    rng, measured = random.Random(SEED), []
    with serving(tmp_path, "--models", str(models)) as (address, process):
        for i in range(PROMPTS):
            run(address, drawn(rng))
            if i % 5 == 4:
                run(address, prompt(NAMES, "auto", [], (96, 96), i))
                measured.append(own_memory(process.pid))
    warm = measured[int(WARM_UP * len(measured)) :]
    assert max(warm) <= GROWTH * warm[0], measured
