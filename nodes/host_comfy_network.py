"""Our networks as ComfyUI calls them: transformer and autoencoder (encoders: host_comfy_encoders.py).

ComfyUI calls the transformer step by step and passes prompt and sigma again each time. What does not depend
on the image is still computed once per run: the modulations of all of the run's sigmas as one batch, the text
projection and the rotary table. They are kept from the patcher's pre-run to its clean-up, during which only
scheduled hooks change weights. Patches of ComfyUI's on FLUX become hooks of the block loop in
host_comfy_patches.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core.backends.attention import attention_backend_name
from ..flux_core.model.autoencoder import AutoEncoder
from ..flux_core.model.hooks import Hooks
from ..flux_core.model.layers import Shared
from ..flux_core.model.modulation import Group, Modulations, split_modulations
from ..flux_core.model.ops import Rope, rope_table
from ..flux_core.model.spec import FluxSpec
from ..flux_core.model.strength import strength_bias
from ..flux_core.model.tokens import pack, pad_to_even, unpack
from ..flux_core.model.transformer import Evaluation, FluxTransformer
from ..flux_core.sampling.step_cache import Caching, StepCache
from ..flux_core.tools.kontext import strengths_for
from ..flux_core.tools.references import RopeScale, latent_ids, place_references
from ..flux_core.weights import check_unchanged
from ..flux_core.weights.source_files import files_of, remember_files
from .host_comfy_patches import check_options, hooks_of, patch_inputs
from .wires import checked_finite

log = logging.getLogger(__name__)

CACHING = "rectiflux_caching"
"""`transformer_options` key of a MODEL's Caching."""

RUNNER = "rectiflux_runner"
"""`transformer_options` key of the compiled block runner."""


@dataclass
class Prompt:
    """One batch of prompts during one run: its inputs, and what was computed from them."""

    context: Tensor
    pooled: Tensor | None
    guidance: Tensor | None
    txt: Tensor
    modulations: dict[float, Modulations] = field(default_factory=dict)
    at_zero: Modulations | None = None
    cache: StepCache | None = None

    def is_for(self, context: Tensor, pooled: Tensor | None, guidance: Tensor | None) -> bool:
        return _same(self.context, context) and _same(self.pooled, pooled) and _same(self.guidance, guidance)


@dataclass(frozen=True)
class Layout:
    """The tokens of one call: the generated latent, the references behind it, and how they are placed."""

    h: int
    w: int
    sizes: tuple[tuple[int, int], ...] = ()
    method: str = "offset"
    scale: RopeScale = RopeScale()

    @property
    def generated(self) -> int:
        return ((self.h + 1) // 2) * ((self.w + 1) // 2)

    def ids(self) -> Tensor:
        """Position ids [N, 3] of all image tokens."""
        placed = place_references(self.sizes, self.h, self.w, self.method)
        references = [latent_ids(*size, at, self.scale) for size, at in zip(self.sizes, placed, strict=True)]
        return torch.cat([latent_ids(self.h, self.w, scale=self.scale), *references])


class ComfyNetwork(nn.Module):
    """`BaseModel.diffusion_model`: a FluxTransformer's parts under BFL's names, so that LoRAs find them."""

    patch_size = 2
    default_ref_method = "offset"
    """How references are placed unless the conditioning says otherwise; FluxKVCache replaces it."""

    def __init__(self, network: FluxTransformer) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        self._network = (network,)  # in a tuple, so that its parameters are not registered twice
        remember_files(self, files_of(network))
        self._patcher: Any = None
        self._prompts: list[Prompt] = []
        self._ropes: dict[tuple[int, Layout], Rope] = {}
        self._warned: set[str] = set()
        self.caches: list[StepCache] = []
        """Those of the latest run."""

    @property
    def dtype(self) -> torch.dtype:
        return self._network[0].dtype

    @property
    def spec(self) -> FluxSpec:
        return self._network[0].spec

    def attention_name(self, device: torch.device) -> str:
        """The attention back end on a device, in a few words."""
        return attention_backend_name(self._network[0], device)

    def check_unchanged(self) -> None:
        """Raise ValueError when the file that the weights are mapped from has changed."""
        check_unchanged(self)

    def begin(self, patcher: Any) -> None:
        """A sampling run begins: its results may be kept from step to step.

        Raises ValueError when the model's file has changed.
        """
        self.end()
        self.check_unchanged()
        self._patcher = patcher
        self.caches = []
        self._warned.clear()

    def end(self) -> None:
        """The run is over: drop what was kept."""
        self._patcher = None
        self._prompts.clear()
        self._ropes.clear()
        for cache in self.caches:
            cache.clear()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Velocity [B, 16, h, w] of x [B, c, h, w] in model space at sigmas `timestep` [B] in 0..1.

        Odd sides are padded and cropped. Raises ValueError for another model's text, and for patches that do
        not fit FLUX.
        """
        from comfy import patcher_extension as extension

        options = transformer_options or {}
        wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None,
        guidance: Tensor | None,
        ref_latents: list[Tensor] | None,
        control: dict[str, list[Tensor | None]] | None,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        network, options = self._network[0], dict(options)
        self._warn(check_options(options, kwargs))
        references = ref_latents or []
        for latent in references:
            self.spec.check_reference(latent.shape[1] * self.patch_size**2)
        layout = self._layout(x, references, options, kwargs.get("ref_latents_method"))
        if references:
            options["reference_image_num_tokens"] = [Layout(*size).generated for size in layout.sizes]
        prompt = self._prompt(context, y, guidance)
        latents = [x, *(ref.to(x.device, x.dtype).expand(len(x), -1, -1, -1) for ref in references)]
        img = torch.cat([network.img_in(pack(pad_to_even(latent))) for latent in latents], dim=1)
        img, txt, rope = self._inputs(img, prompt, layout, options)
        modulations = self._modulations(prompt, timestep, options.get("sample_sigmas"))
        runner, bias = options.get(RUNNER), kwargs.get("attention_mask")
        if bias is not None:
            bias = bias if bias.dtype == torch.bool else bias.to(img)
            bias = bias.view(-1, 1, *bias.shape[-2:])
        if (strengths := kwargs.get("ref_latents_strengths")) is not None:
            bias = _with_strengths(bias, layout, txt.shape[1], strengths, img)
        evaluation = Evaluation(
            txt,
            modulations,
            Shared(rope, network.ops(x.device, runner is not None), bias),
            self._hooks(prompt, float(timestep[0]), options, control),
            self._groups(prompt, layout, img.shape[1] - layout.generated),
            layout.generated,
            runner,
        )
        even = [side + side % 2 for side in x.shape[-2:]]
        velocity = unpack(network.run_blocks(img, evaluation), even[0], even[1])
        return velocity[..., : layout.h, : layout.w]

    @property
    def _keeps(self) -> bool:
        """Whether results serve later steps: in a run, with weights that no hook LoRA or training changes."""
        scheduled = getattr(self._patcher, "current_hooks", None) is not None
        return self._patcher is not None and not scheduled and not torch.is_grad_enabled()

    def _warn(self, messages: list[str]) -> None:
        for message in messages:
            if message not in self._warned:
                self._warned.add(message)
                log.warning(message)

    def _layout(
        self, x: Tensor, references: list[Tensor], options: dict[str, Any], method: str | None
    ) -> Layout:
        sizes = tuple((int(ref.shape[-2]), int(ref.shape[-1])) for ref in references)
        known = ("scale_x", "scale_y", "shift_x", "shift_y", "shift_t")
        given = options.get("rope_options") or {}
        scale = RopeScale(**{name: float(given[name]) for name in known if name in given})
        return Layout(*x.shape[-2:], sizes, method or self.default_ref_method, scale)

    def _inputs(
        self, img: Tensor, prompt: Prompt, layout: Layout, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Rope]:
        """Image and text tokens and the rotary table, after "post_input" patches."""
        spec, length = self.spec, prompt.txt.shape[1]
        key = (length, layout)
        if (patches := options.get("patches", {}).get("post_input")) is None:
            if key not in self._ropes:
                ids = torch.cat([torch.zeros(length, 3), layout.ids()])
                rope = rope_table(ids, spec.axes_dim, spec.theta, img.device)
                if self._patcher is None:
                    return img, prompt.txt, rope
                self._ropes[key] = rope
            return img, prompt.txt, self._ropes[key]
        img, txt, ids = patch_inputs(patches, img, prompt.txt, layout.ids(), options)
        return img, txt, rope_table(ids, spec.axes_dim, spec.theta, img.device)

    def _hooks(self, prompt: Prompt, sigma: float, options: dict[str, Any], control: Any) -> Hooks:
        cache = None if control else self._cache(prompt, options.get(CACHING))
        return hooks_of(options, control or {}, () if cache is None else (cache.hook(sigma),))

    def _cache(self, prompt: Prompt, caching: Caching | None) -> StepCache | None:
        """The prompt's step cache in this run, where steps are cached."""
        if caching is None or not self._keeps:
            return None
        if prompt.cache is None:
            prompt.cache = caching.new_cache()
            self.caches.append(prompt.cache)
        return prompt.cache

    def _prompt(self, context: Tensor, pooled: Tensor | None, guidance: Tensor | None) -> Prompt:
        """The prompts of this call, text projected; from an earlier step when they are the same."""
        for prompt in self._prompts if self._keeps else ():
            if prompt.is_for(context, pooled, guidance):
                return prompt
        txt = self._network[0].project_text(context, context.dtype)  # that of ModelComputeDtype
        prompt = Prompt(context, pooled, guidance, txt)
        if self._keeps:
            for old in self._prompts[:-3]:
                if old.cache is not None:
                    old.cache.clear()
            self._prompts = [*self._prompts[-3:], prompt]
        return prompt

    def _modulations(self, prompt: Prompt, timestep: Tensor, schedule: Tensor | None) -> Modulations:
        """The modulations at `timestep`; the first time, those of the whole schedule in one batch.

        Of the sigmas that a solver adds only the latest is kept: an adaptive one adds hundreds.
        """
        sigmas = timestep.tolist()
        if len(set(sigmas)) > 1 or not self._keeps:
            return self._modulate(prompt, timestep)
        sigma = sigmas[0]
        if sigma not in prompt.modulations:
            planned = [] if schedule is None else [value for value in schedule.tolist() if value > 0.0]
            wanted = planned if sigma in planned else [sigma]
            kept = prompt.modulations.items()
            prompt.modulations = {value: found for value, found in kept if value in planned}
            every = torch.tensor(wanted, device=timestep.device).repeat_interleave(len(timestep))
            rows = split_modulations(self._modulate(prompt, every), len(timestep))
            prompt.modulations.update(zip(wanted, rows, strict=False))
        return prompt.modulations[sigma]

    def _modulate(self, prompt: Prompt, sigma: Tensor) -> Modulations:
        """Modulations for sigma [S B], with the prompts [B] repeated as often as needed."""
        pooled, guidance, batch = prompt.pooled, prompt.guidance, len(prompt.context)
        times = len(sigma) // batch
        if guidance is not None:
            guidance = guidance.expand(batch).repeat(times)
        pooled = None if pooled is None else pooled.repeat(times, 1)
        network = self._network[0]
        return network.modulate(network.embed_time(sigma, guidance, pooled, prompt.txt.dtype))

    def _groups(self, prompt: Prompt, layout: Layout, count: int) -> tuple[Group, ...]:
        """The `count` reference tokens with modulations as at sigma 0, where their method says so."""
        if count == 0 or layout.method != "index_timestep_zero":
            return ()
        if prompt.at_zero is None:
            prompt.at_zero = self._modulate(prompt, prompt.context.new_zeros(len(prompt.context)).float())
        return ((count, prompt.at_zero),)


def _with_strengths(
    bias: Tensor | None, layout: Layout, txt_length: int, strengths: Sequence[float], img: Tensor
) -> Tensor | None:
    """The attention bias with the strengths of references, on the device of `img`."""
    counts = [Layout(*size).generated for size in layout.sizes]
    each = strengths_for(len(counts), strengths)
    found = strength_bias(txt_length, layout.generated, list(zip(counts, each, strict=True)))
    if found is None or bias is None:
        return bias if found is None else found.to(img)
    bias = torch.where(bias, 0.0, -torch.inf) if bias.dtype == torch.bool else bias
    return found.to(img) + bias.to(img)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class VAEModule(nn.Module):
    """`VAE.first_stage_model`: the autoencoder's halves. A patcher sets `device`, hence no AutoEncoder."""

    def __init__(self, network: AutoEncoder) -> None:
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self._network = (network,)  # in a tuple, so that its parameters are not registered twice

    def check_unchanged(self) -> None:
        """Raise ValueError when the file that the weights are mapped from has changed."""
        check_unchanged(self._network[0])

    def encode(self, image: Tensor) -> Tensor:
        self.check_unchanged()
        return self._network[0].encode(image)

    def decode(self, raw: Tensor) -> Tensor:
        self.check_unchanged()
        image = self._network[0].decode(raw)
        return checked_finite(image, "the image's values", "load another VAE", self._network[0])
