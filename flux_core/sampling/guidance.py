"""The velocity that a solver follows: of one conditioning, or of two by classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..model.hooks import NO_HOOKS, Hooks, Residuals
from ..model.spec import LATENT_CHANNELS, Conditioning, FluxSpec, TokenGroup, Velocity
from ..model.tokens import pack, unpack
from ..model.transformer import FluxTransformer, Prepared
from .step_cache import StepCache


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: a negative prompt, its scale, and down to which sigma it is used.

    v_neg + cfg_scale (v_pos - v_neg) (Ho and Salimans 2022, arXiv:2207.12598), at sigmas from 1 down to
    `cfg_until`; below, and without a negative or at scale 1, the positive prompt alone: what the image shows
    is settled above, and the last steps take half the work (guidance in a limited interval, Kynkäänniemi et
    al. 2024, arXiv:2404.07724). Raises ValueError for a scale that is not finite and a sigma outside 0..1.
    """

    negative: Conditioning | None = None
    cfg_scale: float = 1.0
    cfg_until: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}; 1 turns CFG off")
        if not 0.0 <= self.cfg_until <= 1.0:
            raise ValueError(f"cfg_until must be a sigma between 0 and 1, got {self.cfg_until}")

    @property
    def is_used(self) -> bool:
        return self.negative is not None and self.cfg_scale != 1.0


@dataclass(frozen=True)
class VelocityRequest:
    """Which velocity is wanted: of which prompt, at which sigmas (None: any), for [batch, 16, h, w] latents.

    `new_cache` makes the step cache of each pass through the network (sampling/step_cache.py); `hooks` are
    attached to every pass.
    """

    conditioning: Conditioning
    sigmas: Sequence[float] | None
    h: int
    w: int
    batch: int = 1
    guidance: Guidance = Guidance()
    new_cache: Callable[[], StepCache] | None = None
    hooks: Hooks = NO_HOOKS


def guided_velocity(transformer: FluxTransformer, request: VelocityRequest) -> Velocity:
    """Velocity of latents [batch, 16, h, w] in model space, at the request's sigmas only; with None, at any.

    Both halves of classifier-free guidance share a batch; prompts of different lengths or distilled guidance,
    which cannot, are evaluated one after the other. A negative without distilled guidance takes the
    positive's. Raises ValueError for a model whose input channels are not the latent's and the conditioning's
    `extra`, a conditioning of another batch size, a step cache beside ControlNets, and what
    `FluxTransformer.prepare` raises.
    """
    guidance, sigmas, batch = request.guidance, request.sigmas, request.batch
    for text in (request.conditioning, guidance.negative if guidance.is_used else None):
        if text is not None:
            check_channels(transformer.spec, text.extra)
    positive = _for_batch(request.conditioning, batch)
    low = sigmas if sigmas is None else [sigma for sigma in sigmas if sigma < guidance.cfg_until]
    high = sigmas if sigmas is None else [sigma for sigma in sigmas if sigma >= guidance.cfg_until]
    if guidance.negative is None or not guidance.is_used or high == []:
        return _passes(transformer, [positive], sigmas, request)
    negative = guidance.negative
    if negative.guidance is None:
        negative = replace(negative, guidance=positive.guidance)
    both = _passes(transformer, [positive, _for_batch(negative, batch)], high, request)
    below = low != [] and guidance.cfg_until > 0.0
    positive_only = _passes(transformer, [positive], low, request) if below else None

    def guided(x: Tensor, sigma: float) -> Tensor:
        if positive_only is not None and sigma < guidance.cfg_until:
            return positive_only(x, sigma)
        v_pos, v_neg = both(x, sigma).chunk(2)
        return v_neg + guidance.cfg_scale * (v_pos - v_neg)

    return guided


def _passes(
    transformer: FluxTransformer,
    texts: list[Conditioning],
    sigmas: Sequence[float] | None,
    request: VelocityRequest,
) -> Velocity:
    """The velocities of the texts, [texts * batch, 16, h, w], in one pass where they can share one."""
    joined = _joined(texts, request.batch)
    times = len(texts) // len(joined)
    passes = [_pass(transformer, text, sigmas, request) for text in joined]

    def velocities(x: Tensor, sigma: float) -> Tensor:
        tokens = pack(x).repeat(times, 1, 1)
        found = torch.cat([velocity(tokens, sigma) for velocity in passes])
        return unpack(found, request.h, request.w).to(x.dtype)

    return velocities


def _pass(
    transformer: FluxTransformer,
    conditioning: Conditioning,
    sigmas: Sequence[float] | None,
    request: VelocityRequest,
) -> Velocity:
    """The velocity of tokens [B, N, 64] under one conditioning."""
    h, w, extra = request.h, request.w, conditioning.extra
    has_residuals = any(isinstance(hook, Residuals) for hook in request.hooks.blocks)
    if request.new_cache and (conditioning.controls or has_residuals):
        raise ValueError(
            "a step cache would reuse a ControlNet's residuals of earlier steps; use one or other"
        )
    prepared: Prepared = transformer.prepare(conditioning, sigmas, h, w)
    cache = None if request.new_cache is None else request.new_cache()
    channels = None if extra is None else pack(extra.to(transformer.device))
    controls = [control.begin(conditioning, sigmas, h, w) for control in conditioning.controls]

    def velocity(tokens: Tensor, sigma: float) -> Tensor:
        residuals = [residuals for control in controls if (residuals := control(tokens, sigma)) is not None]
        caching = () if cache is None else (cache.hook(sigma),)
        hooks = replace(request.hooks, blocks=(*caching, *request.hooks.blocks, *residuals))
        if channels is not None:
            tokens = torch.cat([tokens, channels.to(tokens).expand(len(tokens), -1, -1)], dim=-1)
        return transformer(tokens, prepared, sigma, hooks)

    return velocity


def check_channels(spec: FluxSpec, extra: Tensor | None) -> None:
    """Raises ValueError unless a model of `spec` reads a latent and `extra` [B, c, h, w] beside it."""
    given = 4 * (LATENT_CHANNELS + (0 if extra is None else extra.shape[1]))
    if spec.in_channels != given:
        raise ValueError(
            f"the model has {spec.in_channels} input channels, got {given}; "
            f"{CONNECT.get(spec.in_channels, 'choose a model that fits')}"
        )


CONNECT = {
    64: "[dev], [schnell] and Kontext take no control image or masked image beside the latent, "
    "choose a Canny, Depth or Fill model for it",
    128: "Canny and Depth models need a control image, for text to image choose [dev] or [schnell]",
    384: "Fill models need an image and a mask, for text to image choose [dev] or [schnell]",
}
"""What to do about wrong inputs, by the model's input channels."""


def _for_batch(text: Conditioning, batch: int) -> Conditioning:
    """The conditioning, checked to be for one image or for each of the batch."""
    rows = text.txt.shape[0]
    vectors = rows if text.pooled is None else text.pooled.shape[0]
    if rows not in (1, batch) or vectors != rows:
        raise ValueError(
            f"a conditioning must be for 1 image or for all {batch}, got {rows} texts and "
            f"{vectors} pooled vectors; encode one prompt"
        )
    images = [*(group.tokens for group in text.groups), *([] if text.extra is None else [text.extra])]
    for image in images:
        if len(image) not in (1, batch):
            raise ValueError(
                f"an image to condition on must be 1 or one for all {batch}, got {len(image)}; "
                "make the batches equal"
            )
    return text


def _joined(texts: list[Conditioning], batch: int) -> list[Conditioning]:
    """The conditionings as one of [2 batch] rows where only their texts differ, or else as they are."""
    if len(texts) == 1 or not _differ_in_text_alone(*texts):
        return texts
    first, times = texts[0], len(texts)
    txt = torch.cat([text.txt.expand(batch, -1, -1) for text in texts])
    vectors = [text.pooled.expand(batch, -1) for text in texts if text.pooled is not None]
    return [
        replace(
            first,
            txt=txt,
            pooled=torch.cat(vectors) if vectors else None,
            extra=None if first.extra is None else _rows(first.extra, times),
            groups=tuple(replace(group, tokens=_rows(group.tokens, times)) for group in first.groups),
            bias=None if first.bias is None else _rows(first.bias, times),
        )
    ]


def _differ_in_text_alone(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditionings can share a batch: texts of one form, and everything else equal."""
    forms = [(x.txt.shape[1:], None if x.pooled is None else x.pooled.shape[1:]) for x in (a, b)]
    others = [field.name for field in fields(Conditioning) if field.name not in ("txt", "pooled")]
    return forms[0] == forms[1] and all(_equal(getattr(a, name), getattr(b, name)) for name in others)


def _equal(a: object, b: object) -> bool:
    """Whether two values are equal: tensors element by element, groups and tuples part by part."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, TokenGroup) and isinstance(b, TokenGroup):
        return all(_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(TokenGroup))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _rows(rows: Tensor, times: int) -> Tensor:
    """[times B, ...] from [B, ...]; a single row serves every image and stays one."""
    return rows if len(rows) == 1 else rows.repeat(times, *[1] * (rows.ndim - 1))
