"""Our networks in the form in which ComfyUI calls them: transformer, text encoders, autoencoder.

ComfyUI asks the transformer step by step and hands over prompt and sigma anew each time. What does not depend
on the image is still computed once per run: the modulations of all of the run's sigmas as one batch, the text
projection and the rotary table. They are kept from the patcher's pre-run to its clean-up, during which only
scheduled hooks change weights.

Not here: reference latents (Kontext) and attention masks, which are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core.backends.attention import attention_told
from ..flux_core.model.autoencoder import AutoEncoder
from ..flux_core.model.layers import Chunks, Rope, rope_table
from ..flux_core.model.spec import FluxSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer, Modulations, pack, position_ids, unpack
from ..flux_core.sampling.step_cache import BlockMemory, Caching

CACHING = "rectiflux_caching"
"""Under this name a MODEL's transformer options have its Caching."""

RUNNER = "rectiflux_runner"
"""Under this name they have what runs a block, where that is not the block itself."""


@dataclass
class Prompt:
    """One batch of prompts during one run: what was asked, and what came of it."""

    context: Tensor
    pooled: Tensor
    guidance: Tensor | None
    txt: Tensor
    modulations: dict[float, Modulations] = field(default_factory=dict)
    memory: BlockMemory | None = None

    def is_for(self, context: Tensor, pooled: Tensor, guidance: Tensor | None) -> bool:
        return _same(self.context, context) and _same(self.pooled, pooled) and _same(self.guidance, guidance)


@dataclass(frozen=True)
class Known:
    """A memory of earlier steps, and the sigma of this one."""

    memory: BlockMemory
    sigma: float


class ComfyNetwork(nn.Module):
    """`BaseModel.diffusion_model`: a FluxTransformer's parts under BFL's names, so that LoRAs find them."""

    patch_size = 2

    def __init__(self, network: FluxTransformer) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        self._network = (network,)  # in a tuple, so that its parameters are not registered twice
        self._patcher: Any = None
        self._prompts: list[Prompt] = []
        self._ropes: dict[tuple[int, int, int], Rope] = {}
        self.memories: list[BlockMemory] = []
        """Those of the latest run."""

    @property
    def dtype(self) -> torch.dtype:
        return self._network[0].dtype

    @property
    def spec(self) -> FluxSpec:
        return self._network[0].spec

    def attends(self, device: torch.device) -> str:
        """What it attends by on a device, in a few words."""
        return attention_told(self._network[0], device)

    def begin(self, patcher: Any) -> None:
        """A sampling run begins: its results may be kept from step to step."""
        self.end()
        self._patcher = patcher
        self.memories = []

    def end(self) -> None:
        """The run is over: forget what was kept."""
        self._patcher = None
        self._prompts.clear()
        self._ropes.clear()

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

        Raises ValueError for odd h or w, another model's text, and what is not supported (see above).
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
        if ref_latents is not None or kwargs.get("attention_mask") is not None:
            what = "reference latents" if ref_latents is not None else "attention masks"
            raise ValueError(
                f"a model from Load FLUX Model does not take {what}; load it with Load Diffusion Model"
            )
        network, (h, w) = self._network[0], x.shape[-2:]
        if y is None:
            raise ValueError(
                "the conditioning has no pooled CLIP vector; encode the prompt with FLUX.1's text encoders"
            )
        if getattr(self._patcher, "current_hooks", None) is not None:  # weights scheduled over the steps
            self._prompts.clear()
        prompt = self._prompt(context, y, guidance)
        modulations = self._modulations(prompt, timestep, options.get("sample_sigmas"))
        rope = self._rope(context.shape[1], h, w, x.device)
        tokens = network.img_in(pack(x))
        memory = None if control else self._memory(prompt, options.get(CACHING))
        known = None if memory is None else Known(memory, float(timestep[0]))
        return unpack(
            self._blocks(tokens, prompt.txt, modulations, rope, control or {}, options, known), h, w
        )

    def _memory(self, prompt: Prompt, caching: Caching | None) -> BlockMemory | None:
        """What is kept of the prompt's steps in this run, where steps are cached."""
        if caching is None or self._patcher is None:
            return None
        if prompt.memory is None:
            prompt.memory = caching.memory()
            self.memories.append(prompt.memory)
        return prompt.memory

    def _prompt(self, context: Tensor, pooled: Tensor, guidance: Tensor | None) -> Prompt:
        """The prompts of this call, text projected; from an earlier step when they are the same."""
        for prompt in self._prompts:
            if prompt.is_for(context, pooled, guidance):
                return prompt
        prompt = Prompt(context, pooled, guidance, self._network[0].project_text(context))
        if self._patcher is not None:
            self._prompts = [*self._prompts[-3:], prompt]
        return prompt

    def _modulations(self, prompt: Prompt, timestep: Tensor, schedule: Tensor | None) -> Modulations:
        """The modulations at `timestep`; the first time, those of the whole schedule in one batch.

        Of the sigmas that a solver adds of its own only the latest is kept: an adaptive one adds hundreds.
        """
        sigmas = timestep.tolist()
        if len(set(sigmas)) > 1 or self._patcher is None:
            return self._modulate(prompt, timestep)
        sigma = sigmas[0]
        if sigma not in prompt.modulations:
            planned = [] if schedule is None else [value for value in schedule.tolist() if value > 0.0]
            wanted = planned if sigma in planned else [sigma]
            kept = prompt.modulations.items()
            prompt.modulations = {value: found for value, found in kept if value in planned}
            every = torch.tensor(wanted, device=timestep.device).repeat_interleave(len(timestep))
            prompt.modulations.update(
                zip(wanted, _split(self._modulate(prompt, every), len(timestep)), strict=False)
            )
        return prompt.modulations[sigma]

    def _modulate(self, prompt: Prompt, sigma: Tensor) -> Modulations:
        """Modulations for sigma [S B], with the prompts [B] repeated as often as needed."""
        pooled, guidance = prompt.pooled, prompt.guidance
        times = len(sigma) // len(pooled)
        if guidance is not None:
            guidance = guidance.expand(len(pooled)).repeat(times)
        network = self._network[0]
        return network.modulate(network.embed_time(sigma, guidance, pooled.repeat(times, 1)))

    def _rope(self, text_length: int, h: int, w: int, device: torch.device) -> Rope:
        key = (text_length, h, w)
        if key not in self._ropes:
            spec = self._network[0].spec
            rope = rope_table(position_ids(*key), spec.axes_dim, spec.theta, device)
            if self._patcher is None:
                return rope
            self._ropes[key] = rope
        return self._ropes[key]

    def _blocks(
        self,
        img: Tensor,
        txt: Tensor,
        modulations: Modulations,
        rope: Rope,
        control: dict[str, list[Tensor | None]],
        options: dict[str, Any],
        known: Known | None = None,
    ) -> Tensor:
        """Velocity tokens [B, N, 64]: FluxTransformer.blocks with ControlNets and replaced blocks."""
        network, before, run = self._network[0], img, options.get(RUNNER, _plain)
        replaced = options.get("patches_replace", {}).get("dit", {})
        for i, (block, (img_mod, txt_mod)) in enumerate(
            zip(network.double_blocks, modulations.double, strict=True)
        ):

            def double(args: dict[str, Any], block: nn.Module = block) -> dict[str, Tensor]:
                img, txt = run(block, args["img"], args["txt"], *args["vec"], args["pe"])
                return {"img": img, "txt": txt}

            args = {"img": img, "txt": txt, "vec": (img_mod, txt_mod), "pe": rope}
            out = _call(double, replaced.get(("double_block", i)), args, options, i, "double")
            img, txt = _add(out["img"], control.get("input"), i), out["txt"]
            if known is not None and i == 0:
                before, change = img, img - before
                added = known.memory.guess(known.sigma, change)
                if added is not None:
                    return network.final_layer(img + added, modulations.last)
        x, length = torch.cat([txt, img], dim=1), txt.shape[1]
        for i, (block, mod) in enumerate(zip(network.single_blocks, modulations.single, strict=True)):

            def single(args: dict[str, Any], block: nn.Module = block) -> dict[str, Tensor]:
                return {"img": run(block, args["img"], args["vec"], args["pe"])}

            args = {"img": x, "vec": mod, "pe": rope}
            x = _call(single, replaced.get(("single_block", i)), args, options, i, "single")["img"]
            x = _add(x, control.get("output"), i, length)
        x = x[:, length:]
        if known is not None:
            known.memory.keep(known.sigma, x - before)
        return network.final_layer(x, modulations.last)


def _plain(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def _call(
    block: Any, replacement: Any, args: dict[str, Any], options: dict[str, Any], index: int, kind: str
) -> dict[str, Tensor]:
    """The block's result, or that of what a patch put in its place, which may call the block itself."""
    if replacement is None:
        return block(args)
    told = {**options, "block_index": index, "block_type": kind}
    return replacement({**args, "attn_mask": None, "transformer_options": told}, {"original_block": block})


def _add(tokens: Tensor, residuals: list[Tensor | None] | None, index: int, start: int = 0) -> Tensor:
    """The tokens, this block's ControlNet residual added to the image's, which begin at `start`."""
    residual = residuals[index] if residuals is not None and index < len(residuals) else None
    if residual is None:
        return tokens
    tokens = tokens.clone()
    tokens[:, start : start + residual.shape[1]] += residual
    return tokens


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _split(stacked: Modulations, batch: int) -> Iterator[Modulations]:
    """Modulations of one evaluation after the other, from those of a batch of evaluations."""

    def parts(chunks: Chunks) -> list[Chunks]:
        return list(zip(*(chunk.split(batch) for chunk in chunks), strict=True))

    double = [list(zip(parts(img), parts(txt), strict=True)) for img, txt in stacked.double]
    single = [parts(chunks) for chunks in stacked.single]
    for i, last in enumerate(parts(stacked.last)):
        yield Modulations(tuple(block[i] for block in double), tuple(block[i] for block in single), last)


class TextModule(nn.Module):
    """`CLIP.cond_stage_model`: the encoders under the names that LoRA loaders know."""

    def __init__(self, encoders: TextEncoders, dtype: torch.dtype, on_notice: Callable[[str], None]) -> None:
        super().__init__()
        self.encoders, self.on_notice = encoders, on_notice
        self.dtypes = {dtype}
        self.clip_l, self.t5xxl = nn.Module(), nn.Module()
        nested = any(name.startswith("text_model.") for name in encoders.clip.state_dict())
        self.clip_l.transformer = encoders.clip if nested else nn.ModuleDict({"text_model": encoders.clip})
        self.t5xxl.transformer = encoders.t5

    def reset_clip_options(self) -> None:
        """Nothing to reset: see `set_clip_options`."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """FLUX.1 reads CLIP's last layer, whatever layer is asked for (as ComfyUI's own FLUX encoders do)."""

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(txt [1, L, C], pooled [1, P]), on the CPU, of what `PromptTokens` made."""
        length = tokens.get("t5_length")
        encoded = self.encoders.encode([tokens["t5xxl"]], [tokens["l"]], self.on_notice, length)
        return encoded.txt.cpu(), encoded.pooled.cpu()


class PromptTokens:
    """`CLIP.tokenizer`: keeps the texts, under ComfyUI's names, for the encoders to cut up."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, str]:
        return {"l": text, "t5xxl": text}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class VAEModule(nn.Module):
    """`VAE.first_stage_model`: the autoencoder's halves. A patcher sets `device`, hence no AutoEncoder."""

    def __init__(self, network: AutoEncoder) -> None:
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self._network = (network,)  # in a tuple, so that its parameters are not registered twice

    def encode(self, image: Tensor) -> Tensor:
        return self._network[0].encode(image)

    def decode(self, raw: Tensor) -> Tensor:
        return self._network[0].decode(raw)
