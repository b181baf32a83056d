"""ComfyUI's patches on a FLUX model as hooks of the block loop.

A MODEL carries in its `transformer_options` what other nodes attached to it. What is relied on, as of ComfyUI
0.33 (comfy/ldm/flux/model.py and layers.py):

  patches["post_input"]          image and text tokens and their position ids, before the blocks
  patches["attn1_patch"]         queries, keys, values, rotary table and mask of each attention
  patches["attn1_output_patch"]  output of each attention
  patches["double_block"], ["single_block"]   image and text tokens after each block
  patches_replace["dit"]         ("double_block", i) and ("single_block", i): in place of a block
  rope_options                   scales and shifts of positions (host_comfy_network.py)
  optimized_attention_override   another attention function
  control                        residuals of ControlNets, generated tokens only
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..flux_core.model.hooks import (
    QKV,
    Attention,
    BlockHook,
    Hooks,
    Place,
    Residuals,
    RunBlock,
    Streams,
)
from ..flux_core.model.ops import Rope

Options = dict[str, Any]

PATCHES = {"post_input", "attn1_patch", "attn1_output_patch", "double_block", "single_block"}

OPTIONS = {
    "patches",
    "patches_replace",
    "rope_options",
    "optimized_attention_override",
    "cond_or_uncond",
    "uuids",
    "sigmas",
    "sample_sigmas",
    "callbacks",
    "wrappers",
    "block",
    "block_index",
    "block_type",
    "total_blocks",
    "img_slice",
    "activations_shape",
    "original_shape",
    "prefetch_dynamic_vbars",
    "multigpu_thread_device",
    "reference_image_num_tokens",
    "easycache",
    "context_window",
}
"""Options that are used here, or that ComfyUI's samplers and wrappers use themselves."""

ARGUMENTS = {"attention_mask", "ref_latents_method", "ref_latents_strengths"}
"""Keyword arguments of a call that are used here."""


def check_options(options: Options, arguments: dict[str, Any]) -> list[str]:
    """A sentence for every option, patch and argument that has no effect on this model."""
    unknown = [f"the option {name!r}" for name in options if name not in OPTIONS and "rectiflux" not in name]
    unknown += [f"the patch {name!r}" for name in options.get("patches", {}) if name not in PATCHES]
    unknown += [
        f"the replacement {kind!r}" for kind in options.get("patches_replace", {}) if kind not in ("dit",)
    ]
    unknown += [f"the input {name!r}" for name in arguments if name not in ARGUMENTS]
    return [f"{what} has no effect on a FLUX model from Load FLUX Model" for what in unknown]


def patch_inputs(
    patches: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
    img: Tensor,
    txt: Tensor,
    img_ids: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, text tokens and position ids [B, L + N, 3] after "post_input" patches."""
    batch = len(img)
    values = {
        "img": img,
        "txt": txt.expand(batch, -1, -1),
        "img_ids": img_ids.to(img.device).expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, txt.shape[1], 3, device=img.device),
        "transformer_options": options,
    }
    for patch in patches:
        values = {**values, **patch(values)}
    return values["img"], values["txt"], torch.cat([values["txt_ids"], values["img_ids"]], dim=1)


def hooks_of(
    options: Options, control: dict[str, list[Tensor | None]], outermost: tuple[BlockHook, ...] = ()
) -> Hooks:
    """The hooks for a call's `transformer_options` and ControlNet residuals; `outermost` come first.

    Raises ValueError for a patch of attention that FLUX cannot call.
    """
    patches = options.get("patches", {})
    blocks: list[BlockHook] = [*outermost]
    if control:
        blocks.append(_controlled(control))
    if after := {
        kind: patches[f"{kind}_block"] for kind in ("double", "single") if f"{kind}_block" in patches
    }:
        blocks.append(_patched_after(after, options))
    if replaced := options.get("patches_replace", {}).get("dit", {}):
        blocks.append(_replaced(replaced, options))
    qkv = tuple(_qkv_hook(patch, options) for patch in patches.get("attn1_patch", []))
    output = tuple(_output_hook(patch, options) for patch in patches.get("attn1_output_patch", []))
    override = "optimized_attention_override" in options
    attention = _overridden(options) if override else None
    return Hooks(tuple(blocks), qkv, attention, output)


def _block_options(options: Options, at: Place, length: int | None = None) -> Options:
    """The options as ComfyUI's blocks pass them on to patches."""
    block_options = {**options, "block_index": at.index, "block_type": at.kind, "total_blocks": at.count}
    if length is not None:
        block_options["img_slice"] = [at.txt_length, length]
    return block_options


def _controlled(control: dict[str, list[Tensor | None]]) -> BlockHook:
    """ControlNet residuals: "input" after double blocks, "output" after single ones, one each."""

    def padded(name: str, count: int) -> list[Tensor | None]:
        found = list(control.get(name) or [])[:count]
        return [*found, *([None] * (count - len(found)))] if found else []

    def controlled(at: Place, streams: Streams, block: RunBlock) -> Any:
        name = "input" if at.kind == "double" else "output"
        residuals = padded(name, at.count)
        hook = Residuals(double=residuals) if at.kind == "double" else Residuals(single=residuals)
        return hook(at, streams, block)

    return controlled


def _patched_after(after: dict[str, list[Any]], options: Options) -> BlockHook:
    """Patches that are given image and text tokens after each block of a kind."""

    def patched(at: Place, streams: Streams, block: RunBlock) -> Streams:
        out = block(streams)
        for patch in after.get(at.kind, []):
            values = {"img": out.img, "txt": out.txt, "block_index": at.index}
            found = patch({**values, "transformer_options": _block_options(options, at)})
            out = Streams(found.get("img", out.img), found.get("txt", out.txt))
        return out

    return patched


def _replaced(replaced: dict[Any, Any], options: Options) -> BlockHook:
    """Patches in place of blocks; they may call the original block."""

    def around(at: Place, streams: Streams, block: RunBlock) -> Streams:
        patch = replaced.get((f"{at.kind}_block", at.index))
        if patch is None:
            return block(streams)

        pe, mask = _to_pe(at.shared.rope), at.shared.bias

        def original(args: dict[str, Any]) -> dict[str, Any]:
            changes: dict[str, Any] = {}
            if args.get("pe", pe) is not pe:
                changes["rope"] = _from_pe(args["pe"])
            if args.get("attn_mask", mask) is not mask:
                changes["bias"] = args["attn_mask"]
            out = block(Streams(args["img"], args.get("txt")), **changes)
            return {"img": out.img} if out.txt is None else {"img": out.img, "txt": out.txt}

        args: dict[str, Any] = {"img": streams.img, "vec": None, "pe": pe, "attn_mask": mask}
        if streams.txt is not None:
            args["txt"] = streams.txt
        args["transformer_options"] = _block_options(options, at)
        found = patch(args, {"original_block": original})
        return Streams(found["img"], found.get("txt", streams.txt))

    return around


def _qkv_hook(patch: Any, options: Options) -> Any:
    parameters = inspect.signature(patch).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and not {"pe", "attn_mask"} <= parameters.keys():
        name = getattr(patch, "__qualname__", type(patch).__name__)
        raise ValueError(
            f"an attention patch ({name}) is made for a UNet and cannot run on FLUX: it takes no positions "
            "(pe); remove the node that adds it, such as HyperTile or TomePatchModel"
        )

    def hook(at: Place, state: QKV) -> QKV:
        block_options = _block_options(options, at, state.q.shape[2])
        pe = None if state.rope is None else _to_pe(state.rope)
        out = patch(state.q, state.k, state.v, pe=pe, attn_mask=state.bias, extra_options=block_options)
        new = out.get("pe", pe)
        rope = state.rope if new is pe else None if new is None else _from_pe(new)
        bias = out.get("attn_mask", state.bias)
        return QKV(out.get("q", state.q), out.get("k", state.k), out.get("v", state.v), rope, bias)

    return hook


def _output_hook(patch: Any, options: Options) -> Any:
    def hook(at: Place, out: Tensor) -> Tensor:
        return patch(out, _block_options(options, at, out.shape[1]))

    return hook


def _overridden(options: Options) -> Callable[[Place, Attention], Attention]:
    """ComfyUI's own attention, which calls what a node put in its place."""

    def bind(at: Place, compute: Attention) -> Attention:
        from comfy.ldm.modules.attention import optimized_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            block_options = _block_options(options, at)
            return optimized_attention(
                q, k, v, q.shape[1], skip_reshape=True, mask=bias, transformer_options=block_options
            )

        return attend

    return bind


def _to_pe(rope: Rope) -> Tensor:
    """ComfyUI's rotation matrices [B, 1, L, D/2, 2, 2] of a rotary table."""
    cos, sin = (part.squeeze(-1) for part in rope)
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


def _from_pe(pe: Tensor) -> Rope:
    """The rotary table of ComfyUI's rotation matrices."""
    return pe[..., 0, 0].unsqueeze(-1), pe[..., 1, 0].unsqueeze(-1)
