"""The embedded editor's side of the nodes.

Here a MODEL is an `EmbeddedModel`, a CLIP a `TextEncoders`, a VAE an `AutoEncoder` and a SAMPLER a `Solver`;
wires from nodes of another pack are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..flux_core.backends.attention import attention_backend_name
from ..flux_core.backends.compile import compile_blocks
from ..flux_core.lora import LoraUse, read_lora, with_lora, with_text_lora
from ..flux_core.memory import tiling
from ..flux_core.model.autoencoder import AutoEncoder, to_model_space, to_vae_space
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.pipeline import Guidance, SampleRequest
from ..flux_core.pipeline import sample as core_sample
from ..flux_core.sampling import preview
from ..flux_core.sampling.solver import Report, Solver, Step
from ..flux_core.sampling.step_cache import Caching, StepCache
from ..flux_core.weights import Source, check_unchanged
from ..host import context
from . import host_embedded_loading as loading
from .conditioning_wires import Entries, core_conditioning
from .host import Host
from .host_embedded_loading import EmbeddedModel
from .model_files import folders_below
from .run_report import Stopwatch, report_text, skipped
from .wires import (
    SamplerInputs,
    checked_finite,
    from_core_image,
    start_latent,
    to_core_image,
)

T = TypeVar("T")


class EmbeddedHost(Host):
    """Runs models on one device, by default the GPU where there is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or loading.default_device()

    # Files

    def model_folders(self, name: str) -> list[Path]:
        return [path for root in context.model_folders() for path in folders_below(Path(root), name)]

    # Loading

    def load_model(self, source: Source, weight_dtype: str, memory_limit: str) -> EmbeddedModel:
        return loading.load_model(source, weight_dtype, memory_limit, self.device)

    def load_text_encoders(self, clip: Source, t5: Source) -> TextEncoders:
        return loading.load_text_encoders(clip, t5, self.device)

    def load_vae(self, source: Source) -> AutoEncoder:
        return loading.load_vae(source, self.device)

    # Changing a model: the one received stays as it was

    def add_lora(
        self, model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
    ) -> tuple[EmbeddedModel, TextEncoders | None, str]:
        model = _expected(model, EmbeddedModel, "MODEL", "Load FLUX Model")
        check_unchanged(model.network)
        uses = [LoraUse(read_lora(path, model.network.spec), strength_model, strength_clip, blocks)]
        network, report = with_lora(model.network, uses)
        if clip is not None:
            encoders = _expected(clip, TextEncoders, "CLIP", "Load FLUX Text Encoders")
            clip, text_report = with_text_lora(encoders, uses)
            report = report.joined(text_report)
        return replace(model, network=network), clip, report.checked().text()

    def with_caching(self, model: Any, caching: Caching) -> EmbeddedModel:
        return replace(_expected(model, EmbeddedModel, "MODEL", "Load FLUX Model"), caching=caching)

    def with_compiling(self, model: Any, mode: str) -> EmbeddedModel:
        model = _expected(model, EmbeddedModel, "MODEL", "Load FLUX Model")
        return replace(model, network=compile_blocks(model.network, mode))

    # Running

    def t5_length(self, model: Any) -> int:
        return _expected(model, EmbeddedModel, "MODEL", "Load FLUX Model").network.spec.txt_length

    @torch.no_grad()
    def encode_text(
        self,
        clip: Any,
        prompt: str,
        clip_prompt: str,
        guidance: float | None,
        length: int | None,
        weights: str,
    ) -> Entries:
        encoders = _expected(clip, TextEncoders, "CLIP", "Load FLUX Text Encoders")
        check_unchanged(encoders.t5, encoders.clip)
        encoded = encoders.encode([prompt], [clip_prompt], context.notice, length, weights)
        for values, encoder in ((encoded.txt, encoders.t5), (encoded.pooled, encoders.clip)):
            checked_finite(values, "the text encoders' values", "load other text encoders", encoder)
        extra: dict[str, Any] = {"pooled_output": encoded.pooled.cpu()}
        if guidance is not None:
            extra["guidance"] = guidance
        return [[encoded.txt.cpu(), extra]]

    def make_sampler(self, solver: Solver) -> Solver:
        return solver

    def sample(self, inputs: SamplerInputs) -> tuple[Tensor, str]:
        model = _expected(inputs.model, EmbeddedModel, "MODEL", "Load FLUX Model")
        solver = _expected(inputs.sampler, Solver, "SAMPLER", "ODE Solver")
        check_unchanged(model.network)
        spec, (h, w) = model.network.spec, inputs.raw_latent.shape[-2:]
        positive = core_conditioning(inputs.positive, "positive", spec, h, w)
        negative = None
        if inputs.negative is not None:
            negative = core_conditioning(inputs.negative, "negative", spec, h, w)
        reports: list[Report] = []
        caches: list[StepCache] = []

        def new_cache() -> StepCache:
            caches.append(model.caching.new_cache())
            return caches[-1]

        watch = Stopwatch(_step_callback(model.preview))
        latent = core_sample(
            model.network,
            SampleRequest(
                positive,
                inputs.drawn_noise(),
                start_latent(inputs.raw_latent, to_model_space),
                inputs.sigmas,
                solver,
                Guidance(negative, inputs.cfg_scale, inputs.cfg_until),
                noise_mask=inputs.noise_mask,
                seed=inputs.noise.seed,
                new_cache=None if model.caching is None else new_cache,
                on_step=watch,
                on_report=reports.append,
            ),
        )
        # a path that stops early is divided by 1 - sigma, as in ComfyUI, so that samplers can be chained
        raw_latent = to_vae_space(latent / (1 - float(inputs.sigmas[-1]))).float().cpu()
        remedy = "choose bf16 or fp32 as weight_dtype"
        checked_finite(raw_latent, "the sampled values", remedy, model.network)
        attention = attention_backend_name(model.network)
        return raw_latent, report_text(reports[0], watch.seconds, skipped(caches), attention)

    @torch.no_grad()
    def decode(self, vae: Any, raw_latent: Tensor) -> Tensor:
        """An image that needs more memory than is free is decoded in strips, with a progress bar."""
        autoencoder = _expected(vae, AutoEncoder, "VAE", "Load FLUX VAE")
        check_unchanged(autoencoder)
        image = tiling.decode(autoencoder, raw_latent.to(autoencoder.device), loading.progress())
        return from_core_image(checked_finite(image, "the image's values", "load another VAE", autoencoder))

    @torch.no_grad()
    def encode(self, vae: Any, image: Tensor) -> Tensor:
        """In strips as `decode`."""
        autoencoder = _expected(vae, AutoEncoder, "VAE", "Load FLUX VAE")
        check_unchanged(autoencoder)
        core_image = to_core_image(image).to(autoencoder.device)
        return tiling.encode(autoencoder, core_image, loading.progress()).float().cpu()


def _step_callback(factors: preview.Factors | None) -> Callable[[Step], None]:
    """A callback of every step that shows progress and a preview, and raises when interrupted."""

    def report(step: Step) -> None:
        context.progress(step.index + 1, step.steps)
        context.preview(lambda: preview.to_rgb(step.denoised, factors))

    return report


def _expected(value: Any, kind: type[T], wire: str, node: str) -> T:
    """The value itself. Raises TypeError unless it is of our own kind; `node` creates such a `wire`."""
    if not isinstance(value, kind):
        raise TypeError(f"the {wire} must come from {node} here, got {type(value).__name__}; connect {node}")
    return value
