"""Which host runs the nodes, and what they ask of it; the embedded editor's side. ComfyUI's is _comfy.py.

The functions here are all that the nodes call, and each hands over to the one of the same name in _comfy.py
when ComfyUI is running. In the embedded editor a MODEL is an `EmbeddedModel`, a CLIP a `TextEncoders`, a VAE
an `AutoEncoder` and a SAMPLER a `Solver`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..flux_core.backends.attention import attention_backend_name
from ..flux_core.backends.compile import compile_blocks
from ..flux_core.backends.cpu_linear import can_pack
from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.backends.quantize import check_int8, fp8_bytes, quantize_to_fp8, quantize_to_int8
from ..flux_core.lora import LoraUse, read_lora, with_lora, with_text_lora
from ..flux_core.memory import fits, limit_of, stream, tiling
from ..flux_core.model.autoencoder import AutoEncoder, to_model_space, to_vae_space
from ..flux_core.model.text_encoders import OWN_LENGTH, TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import Guidance, SampleRequest
from ..flux_core.pipeline import sample as core_sample
from ..flux_core.sampling import preview
from ..flux_core.sampling.solver import Report, Solver, Step
from ..flux_core.sampling.step_cache import Caching, StepCache
from ..flux_core.weights import load_autoencoder, load_transformer, read_metadata
from ..flux_core.weights import load_text_encoders as core_load_text_encoders
from . import wires as _wires
from .memory_advice import advice_when_full
from .model_files import PACK_MODELS, folders_for, names_in, path_of, why_not
from .run_report import Stopwatch, in_percent, report_text, skipped

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""What the weights become, None for the file's own; int8 and fp8 are multiplied as such, the rest in bf16."""

T5_LENGTHS: dict[str, int | None] = {"auto": None, "512": 512, "256": 256, "128": 128, "prompt": OWN_LENGTH}


@dataclass(frozen=True)
class EmbeddedModel:
    """A MODEL of the embedded editor: the network, how its latents look as colours, which steps it skips."""

    network: FluxTransformer
    preview: preview.Factors | None = None
    caching: Caching | None = None


def comfy() -> ModuleType | None:
    """ComfyUI's side, when ComfyUI runs the nodes: it has loaded its own modules before any pack."""
    if "comfy.model_management" not in sys.modules or "folder_paths" not in sys.modules:
        return None
    from . import host_comfy as _comfy

    return _comfy


# Files


def model_roots(folder: str) -> list[Path]:
    """Folders in which models of one kind lie: the artist's, then the pack's."""
    folders = folders_for(folder)
    if (host := comfy()) is not None:
        roots = [root for name in folders for root in host.model_roots(name)]
    else:
        from ..host import context

        roots = [Path(root) / name for name in folders for root in context.model_folders()]
    return list(dict.fromkeys([*roots, *(PACK_MODELS / name for name in folders)]))


def list_models(folder: str) -> list[str]:
    """Names of the models of one kind, as the host writes them: the artist's, then the pack's."""
    found = names_in(model_roots(folder), folder)
    return [path.as_posix() if comfy() is None else str(path) for path in found]


def model_path(folder: str, name: str) -> Path:
    """The file or folder of a name in `list_models`. Raises FileNotFoundError, and ValueError for ../x."""
    return path_of(model_roots(folder), folder, name)


def why_no_model(folder: str, name: str) -> str | None:
    """What is wrong with a model's name, in half a sentence, or None: for VALIDATE_INPUTS."""
    return why_not(model_roots(folder), folder, name)


# Loading


def load_model(path: Path, weight_dtype: str, memory_limit: str) -> Any:
    """A MODEL from a FLUX.1 transformer's file, with at most so much of its weights on the device.

    In the embedded editor what computes on a CPU is packed for it (flux_core.backends.cpu_pack). Raises what
    flux_core.weights.load_transformer raises, and ValueError where int8 or fp8 cannot be.
    """
    dtype = WEIGHT_DTYPES[weight_dtype]
    if (host := comfy()) is not None:
        if weight_dtype in ("int8", "fp8"):
            return host.load_model(path, None, memory_limit, weight_dtype)
        return host.load_model(path, dtype, memory_limit)
    device = _device()
    if weight_dtype == "int8":
        network = _in_int8(path, device, memory_limit)
    elif weight_dtype == "fp8":
        network = _in_fp8(path, device, memory_limit)
    else:
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        network = load_transformer(path, dtype, device, _progress(), limit_of(memory_limit, device))
    if device.type == "cpu" and fits(network, device):  # else its weights stay pages of the file
        pack_weights(network, _progress())
    return EmbeddedModel(network, preview.from_metadata(read_metadata(path)))


def _in_int8(path: Path, device: torch.device, memory_limit: str) -> FluxTransformer:
    """A network that multiplies in int8, once it is sure that it can and that there is room."""
    check_int8(device)
    dtype = torch.bfloat16 if can_pack(device, torch.bfloat16) else torch.float32
    network = load_transformer(path, dtype, device, _progress())
    quantize_to_int8(network, limit_of(memory_limit, device), _progress())
    return network


def _in_fp8(path: Path, device: torch.device, memory_limit: str) -> FluxTransformer:
    """A network that keeps fp8 and multiplies in it where the card can; on a card streamed if it must be."""
    limit, on_cpu = limit_of(memory_limit, device), device.type == "cpu"
    dtype = torch.float32 if on_cpu and not can_pack(device, torch.bfloat16) else torch.bfloat16
    network = load_transformer(path, dtype, on_progress=_progress())
    fitting = limit is None or fp8_bytes(network) <= limit
    quantize_to_fp8(network, device if fitting else None, limit if on_cpu else None, _progress())
    return network if on_cpu else stream(network, device, limit)


def load_text_encoders(clip_path: Path, t5_path: Path) -> Any:
    """A CLIP from the two text encoders' files. Raises what flux_core.weights.load_text_encoders raises.

    In the embedded editor an encoder for which the graphics card has no room reads on the CPU.
    """
    if (host := comfy()) is not None:
        return host.load_text_encoders(clip_path, t5_path)
    device, load = _device(), partial(core_load_text_encoders, clip_path, t5_path)
    # without 16-bit products a CPU takes three times as long in a file's float16 as in float32, in which each
    # layer's numbers are made when they are used, where a copy of all would be large
    on_cpu = None if can_pack(torch.device("cpu"), torch.bfloat16) else torch.float32
    if device.type == "cpu":
        return load(on_cpu, on_progress=_progress())
    encoders, reading_on_cpu = load(on_progress=_progress()), None
    for name in ("t5", "clip"):
        if fits(getattr(encoders, name), device):
            getattr(encoders, name).to(device)
        elif on_cpu is not None:
            reading_on_cpu = reading_on_cpu or load(on_cpu)
            setattr(encoders, name, getattr(reading_on_cpu, name))
    return encoders


def load_vae(path: Path) -> Any:
    """A VAE from an autoencoder's file. Raises what flux_core.weights.load_autoencoder raises."""
    if (host := comfy()) is not None:
        return host.load_vae(path)
    device = _device()
    dtype = torch.float32 if device.type == "cpu" else None
    return load_autoencoder(path, dtype, device, _progress())


def load_checkpoint(path: Path, weight_dtype: str, memory_limit: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE from an all-in-one file or a pipeline's folder. Raises what the three raise."""
    model = load_model(path, weight_dtype, memory_limit)
    return model, load_text_encoders(path, path), load_vae(path)


def _progress() -> Callable[[int, int], None]:
    """What hears how much is read or computed, and shows it at the node; raises when the user interrupts."""
    from ..host import context

    return in_percent(context.progress)


def add_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
) -> tuple[Any, Any, str]:
    """MODEL and CLIP (or None) with a LoRA, those that came in untouched, and a report of what fitted.

    Raises what flux_core.lora's read_lora and with_lora raise, and ValueError where nothing was attached.
    """
    if (host := comfy()) is not None:
        return host.add_lora(model, clip, path, strength_model, strength_clip, blocks)
    _expect(model, EmbeddedModel, "MODEL", "Load FLUX Model")
    uses = [LoraUse(read_lora(path, model.network.spec), strength_model, strength_clip, blocks)]
    network, report = with_lora(model.network, uses)
    if clip is not None:
        _expect(clip, TextEncoders, "CLIP", "Load FLUX Text Encoders")
        clip, told = with_text_lora(clip, uses)
        report = report.joined(told)
    return replace(model, network=network), clip, report.checked().text()


def with_caching(model: Any, caching: Caching) -> Any:
    """The MODEL, skipping steps so from now on; the one that came in stays as it was."""
    if (host := comfy()) is not None:
        return host.with_caching(model, caching)
    _expect(model, EmbeddedModel, "MODEL", "Load FLUX Model")
    return replace(model, caching=caching)


def with_compiling(model: Any) -> Any:
    """The MODEL with its blocks compiled when it first runs; the one that came in stays as it was.

    Raises ValueError where torch.compile cannot work.
    """
    if (host := comfy()) is not None:
        return host.with_compiling(model)
    _expect(model, EmbeddedModel, "MODEL", "Load FLUX Model")
    return replace(model, network=compile_blocks(model.network))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Running


def t5_length(choice: str, model: Any | None) -> int | None:
    """T5's tokens for one of T5_LENGTHS: for auto those that the MODEL is used with, None without one."""
    if choice != "auto" or model is None:
        return T5_LENGTHS[choice]
    if (host := comfy()) is not None:
        return host.t5_length(model)
    _expect(model, EmbeddedModel, "MODEL", "Load FLUX Model")
    return model.network.spec.txt_length


@torch.no_grad()
def encode_text(
    clip: Any, prompt: str, clip_prompt: str = "", guidance: float | None = None, length: int | None = None
) -> _wires.Entries:
    """A CONDITIONING of one prompt; `clip_prompt`, when not empty, is what CLIP reads in its place.

    `length` counts T5's tokens, at most as many as the encoders are made for; None is their own number.
    """
    clip_prompt = clip_prompt or prompt
    if (host := comfy()) is not None:
        return host.encode_text(clip, prompt, clip_prompt, guidance, length)
    from ..host import context

    _expect(clip, TextEncoders, "CLIP", "Load FLUX Text Encoders")
    encoded = clip.encode([prompt], [clip_prompt], context.notice, length)
    extra = {"pooled_output": encoded.pooled.cpu()}
    if guidance is not None:
        extra["guidance"] = guidance
    return [[encoded.txt.cpu(), extra]]


def make_sampler(solver: Solver) -> Any:
    """A SAMPLER that takes the solver's steps."""
    return solver if (host := comfy()) is None else host.make_sampler(solver)


def sample(
    model: Any,
    positive: _wires.Entries,
    negative: _wires.Entries | None,
    cfg_scale: float,
    noise: Any,
    latent: _wires.Latent,
    sigmas: Tensor,
    sampler: Any,
    cfg_until: float = 0.0,
) -> tuple[Tensor, str]:
    """Raw samples [B, 16, h, w] on the CPU, from the latent noised to sigmas[0], and a report of the run.

    Checks before it runs.
    """
    samples = _wires.raw_samples(latent)
    sigmas = _wires.checked_sigmas(sigmas)
    if (host := comfy()) is not None:
        with advice_when_full():
            return host.sample(
                model, positive, negative, cfg_scale, noise, latent, sigmas, sampler, cfg_until
            )
    _expect(model, EmbeddedModel, "MODEL", "Load FLUX Model")
    _expect(sampler, Solver, "SAMPLER", "ODE Solver")
    start = _wires.model_space_start(samples, to_model_space)
    against = None if negative is None else _wires.core_conditioning(negative, "negative")
    told: list[Report] = []
    memories: list[StepCache] = []

    def memory() -> StepCache:
        memories.append(model.caching.new_cache())
        return memories[-1]

    watch = Stopwatch(_reporter(model.preview))
    result = core_sample(
        model.network,
        SampleRequest(
            _wires.core_conditioning(positive, "positive"),
            noise.generate_noise(latent),
            start,
            sigmas,
            sampler,
            Guidance(against, cfg_scale, cfg_until),
            noise_mask=latent.get("noise_mask"),
            seed=noise.seed,
            new_cache=None if model.caching is None else memory,
            on_step=watch,
            on_report=told.append,
        ),
    )
    # as ComfyUI hands on a path that stops early, so that samplers chain
    samples = to_vae_space(result / (1 - float(sigmas[-1]))).float().cpu()
    samples = _wires.checked_finite(samples, "the sampled values", "choose bf16 or fp32 as weight_dtype")
    return samples, report_text(
        told[0], watch.seconds, skipped(memories), attention_backend_name(model.network)
    )


def _reporter(factors: preview.Factors | None) -> Any:
    """What is called after every step: tells and shows the editor, and raises when interrupted."""
    from ..host import context

    def report(step: Step) -> None:
        context.progress(step.index + 1, step.steps)
        context.preview(lambda: preview.to_rgb(step.denoised, factors))

    return report


@torch.no_grad()
def decode(vae: Any, samples: Tensor) -> Tensor:
    """An IMAGE [B, H, W, 3] from raw samples.

    In the embedded editor a picture that would need too much memory is decoded in strips, with a bar.
    """
    if (host := comfy()) is not None:
        return host.decode(vae, samples)
    _expect(vae, AutoEncoder, "VAE", "Load FLUX VAE")
    image = tiling.decode(vae, samples.to(vae.device), _progress())
    return _wires.from_core_image(_wires.checked_finite(image, "the colours", "load another VAE"))


@torch.no_grad()
def encode(vae: Any, image: Tensor) -> Tensor:
    """Raw samples [B, 16, h, w], float32 on the CPU, from an IMAGE; in strips as `decode`."""
    if (host := comfy()) is not None:
        return host.encode(vae, image)
    _expect(vae, AutoEncoder, "VAE", "Load FLUX VAE")
    core_image = _wires.to_core_image(image).to(vae.device)
    return tiling.encode(vae, core_image, _progress()).float().cpu()


def _expect(value: Any, kind: type, wire: str, node: str) -> None:
    """Raise TypeError unless what came over the wire is of our kind."""
    if not isinstance(value, kind):
        raise TypeError(f"the {wire} must come from {node} here, got {type(value).__name__}; connect {node}")
