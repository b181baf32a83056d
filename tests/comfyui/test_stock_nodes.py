"""Our MODEL, CLIP, VAE, NOISE, SIGMAS and SAMPLER with ComfyUI's own nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec
from safetensors.torch import save_file

from ..nodes import graphs
from ..nodes.tiny import random_weights
from .pictures import FLOWS, STEPS, custom_advanced, k_sampler, our_graph, picture, psnr
from .server import ComfyServer


@pytest.fixture(scope="module")
def ours(comfy: ComfyServer, files: graphs.Prompt) -> np.ndarray:
    """Our own nodes' picture, at the sigmas of stock samplers."""
    return picture(comfy, our_graph(files))


@pytest.mark.parametrize("kind", FLOWS)
def test_stock_ksampler_and_vae_decode(comfy: ComfyServer, files: graphs.Prompt, kind: str) -> None:
    """The `simple` scheduler takes its sigmas from a table, 2.4e-4 off ours at most."""
    ours = our_graph(files, kind)
    stock = k_sampler(ours)
    stock["decode"] = graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    assert psnr(picture(comfy, stock), picture(comfy, ours)) >= 40


def test_the_shipped_miniature_in_stock_nodes(comfy: ComfyServer) -> None:
    """mini-pro has no guidance input, hence no shift in KSampler."""
    parts = {"model": "-pro", "clip": "-clip", "t5": "-t5", "vae": "-vae"}
    names = {part: f"rectiflux-mini{end}.safetensors" for part, end in parts.items()}
    ours = graphs.text_to_image(
        graphs.loaders(**names), prompt="a red circle", width=128, height=128, steps=12, shift="none"
    )
    stock = k_sampler(ours, steps=12)
    stock["decode"] = graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    stock["positive"] = graphs.node("CLIPTextEncode", clip=["clip", 0], text="a red circle")
    assert psnr(picture(comfy, stock), picture(comfy, ours)) >= 40


def test_stock_custom_sampler(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    """The same sigmas to the last bit, hence the same picture."""
    assert np.array_equal(picture(comfy, custom_advanced(our_graph(files))), ours)


SOLVER_NODES = {
    "heun_corrected": graphs.node("RectifluxSolver", solver="heun_corrected"),
    "ab2": graphs.node("RectifluxSolver", solver="ab2"),
    "ab3": graphs.node("RectifluxSolver", solver="ab3"),
    "adaptive": graphs.node("RectifluxAdaptiveSolver", rtol=0.1, atol=0.1, max_evaluations=2000),
    "stochastic": graphs.node("RectifluxStochasticSolver", eta=0.6),
}


@pytest.mark.parametrize("name", SOLVER_NODES)
def test_new_solvers_in_the_stock_custom_sampler(
    comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray, name: str
) -> None:
    """The same picture as in our sampler, and not euler's."""
    prompt = our_graph(files) | {"solver": SOLVER_NODES[name]}
    shown = picture(comfy, prompt)
    assert np.array_equal(picture(comfy, custom_advanced(prompt)), shown)
    assert not np.array_equal(shown, ours)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_our_stochastic_solver_is_comfyuis(comfy: ComfyServer, files: graphs.Prompt, eta: float) -> None:
    """SamplerEulerAncestral with the same eta and seed, on the CPU where both draw the same noise."""
    prompt = our_graph(files) | {"solver": graphs.node("RectifluxStochasticSolver", eta=eta)}
    stock = prompt | {"solver": graphs.node("SamplerEulerAncestral", eta=eta, s_noise=1.0)}
    assert psnr(picture(comfy, stock), picture(comfy, prompt)) >= 60


def test_the_report_of_our_sampler_and_of_a_stock_one(comfy: ComfyServer, files: graphs.Prompt) -> None:
    """Shown by ComfyUI's own text preview. Heun in 8 steps asks 16 times, ComfyUI's heun once less."""
    reports = []
    for solver in (
        graphs.node("RectifluxSolver", solver="heun"),
        graphs.node("KSamplerSelect", sampler_name="heun"),
    ):
        prompt = our_graph(files) | {"solver": solver}
        prompt["text"] = graphs.node("PreviewAny", source=["sample", 1])
        reports.append(comfy.run(prompt)["text"]["text"][0].splitlines())
    assert reports[0][:4] == [
        "solver: heun",
        f"steps: {STEPS}",
        f"evaluations of the model: {2 * STEPS}",
        "estimated error: unknown",
    ]
    assert 0 < float(reports[0][4].split()[4]) < 100
    assert reports[1][:3] == ["solver: heun", f"steps: {STEPS}", f"evaluations of the model: {2 * STEPS - 1}"]
    assert reports[1][4] == "straightness of the path: unknown"


def test_stock_sampler_in_our_node(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    prompt = our_graph(files)
    prompt["solver"] = graphs.node("KSamplerSelect", sampler_name="euler")
    assert psnr(picture(comfy, prompt), ours) >= 60


def test_stock_noise_latent_and_guidance_in_our_sampler(comfy: ComfyServer, files: graphs.Prompt) -> None:
    ours = our_graph(files)
    ours["positive"]["inputs"]["guidance"] = 8.0
    stock = our_graph(files)
    stock["noise"] = graphs.node("RandomNoise", noise_seed=7)
    stock["latent"] = graphs.node("EmptySD3LatentImage", width=64, height=48, batch_size=1)
    stock["other"] = graphs.node("FluxGuidance", conditioning=["positive", 0], guidance=8.0)
    stock["sample"]["inputs"]["positive"] = ["other", 0]
    with_guidance = picture(comfy, stock)
    assert np.array_equal(with_guidance, picture(comfy, ours))
    assert psnr(with_guidance, picture(comfy, our_graph(files))) < 40  # and it counts


def test_stock_schedule_by_size_is_ours(comfy: ComfyServer, files: graphs.Prompt) -> None:
    """ModelSamplingFlux with FLUX.1's two shifts, and the `simple` scheduler of what comes out."""
    ours = our_graph(files, shift="by size", width=160, height=96)
    stock = dict(ours)
    stock["shifted"] = graphs.node(
        "ModelSamplingFlux", model=["model", 0], max_shift=1.15, base_shift=0.5, width=160, height=96
    )
    stock["schedule"] = graphs.node(
        "BasicScheduler", model=["shifted", 0], scheduler="simple", steps=STEPS, denoise=1.0
    )
    assert psnr(picture(comfy, stock), picture(comfy, ours)) >= 60


def test_stock_prompt_nodes(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    prompt = our_graph(files)
    text = prompt["positive"]["inputs"]["prompt"]
    prompt["positive"] = graphs.node("CLIPTextEncode", clip=["clip", 0], text=text)
    prompt["negative"] = graphs.node(
        "CLIPTextEncodeFlux", clip=["clip", 0], clip_l="", t5xxl="", guidance=3.5
    )
    assert np.array_equal(picture(comfy, prompt), ours)


def test_stock_vae_nodes(comfy: ComfyServer, files: graphs.Prompt, colours: str) -> None:
    """Encoded by ours and by ComfyUI's node, decoded by ComfyUI's, whole and in tiles."""
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    prompt = files | {
        "picture": graphs.node("LoadImage", image=colours),
        "ours": graphs.node("RectifluxVAEEncode", image=["picture", 0], vae=["vae", 0]),
        "stock": graphs.node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "a": graphs.node("VAEDecode", samples=["ours", 0], vae=["vae", 0]),
        "b": graphs.node("RectifluxVAEDecode", samples=["stock", 0], vae=["vae", 0]),
        "tiled": graphs.node("VAEEncodeTiled", pixels=["picture", 0], vae=["vae", 0], **tiles),
        "c": graphs.node("VAEDecodeTiled", samples=["tiled", 0], vae=["vae", 0], **tiles),
    }
    assert np.array_equal(picture(comfy, prompt, "a"), picture(comfy, prompt, "b"))
    assert picture(comfy, prompt, "c").shape == (1, 256, 512, 3)


@pytest.fixture(scope="module")
def colours(base: Path) -> str:
    """A picture 512 wide and 256 high in the input folder; its name."""
    rising = np.linspace(0, 255, 512, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(rising, rising[::-2, None], rising[::-1]), axis=-1)
    Image.fromarray(pixels).save(base / "input" / "colours.png")
    return "colours.png"


@pytest.fixture
def full_size_vae(base: Path) -> Iterator[str]:
    """FLUX.1's own autoencoder with random weights: ComfyUI's loader takes no other size. Gone afterwards."""
    with torch.device("meta"):
        network = AutoEncoder(AutoEncoderSpec())
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(network, 5, 0.02).items()}
    path = base / "models" / "vae" / "full-size.safetensors"
    save_file(weights, path)
    yield path.name
    path.unlink()


@pytest.mark.slow
def test_stock_vae_and_ours_from_one_file(comfy: ComfyServer, base: Path, full_size_vae: str) -> None:
    """Encoded and decoded by either loader's VAE, through either's nodes."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((96, 64)).save(
        base / "input" / "patches.png"
    )
    prompt = {
        "picture": graphs.node("LoadImage", image="patches.png"),
        "theirs": graphs.node("VAELoader", vae_name=full_size_vae),
        "ours": graphs.node("RectifluxVAELoader", vae_name=full_size_vae),
        "encoded": graphs.node("VAEEncode", pixels=["picture", 0], vae=["theirs", 0]),
        "decoded": graphs.node("VAEDecode", samples=["encoded", 0], vae=["theirs", 0]),
        "a": graphs.node("VAEEncode", pixels=["picture", 0], vae=["ours", 0]),
        "our_vae": graphs.node("VAEDecode", samples=["a", 0], vae=["ours", 0]),
        "b": graphs.node("RectifluxVAEEncode", image=["picture", 0], vae=["theirs", 0]),
        "our_nodes": graphs.node("RectifluxVAEDecode", samples=["b", 0], vae=["theirs", 0]),
    }
    expected = picture(comfy, prompt, "decoded")
    assert psnr(picture(comfy, prompt, "our_vae"), expected) >= 60
    assert np.array_equal(picture(comfy, prompt, "our_nodes"), expected)
