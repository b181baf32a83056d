"""Text to image in eight numbered steps: the only file that joins the stages.

`text_to_image` is the whole on one screen. `sample` is its middle for callers that bring their own noise,
schedule or image to start from, such as the nodes; `guided_velocity` is all that a solver sees of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory.tiling import decode
from .model.autoencoder import AutoEncoder, to_vae_space
from .model.hooks import NO_HOOKS, Hooks, Residuals
from .model.spec import Conditioning, Velocity
from .model.text_encoders import TextEncoders
from .model.transformer import FluxTransformer, TokenGroup, pack, unpack
from .sampling.schedule import make_sigmas
from .sampling.solver import Report, Solver, Step, integrate, seeded_noise, solver_named
from .sampling.step_cache import StepCache

LATENT_CHANNELS = 16
LARGEST_EXACT_SEED = 2**53 - 1
"""JavaScript, and so a node editor, rounds larger integers."""
NOISE_CONVENTIONS = {"comfyui": torch.float32, "reference": torch.bfloat16}
"""Who draws noise in which dtype: ComfyUI; BFL's and diffusers' pipelines with a generator on the CPU."""


@dataclass(frozen=True)
class Models:
    """What text to image needs."""

    text_encoders: TextEncoders
    transformer: FluxTransformer
    autoencoder: AutoEncoder


@torch.no_grad()
def text_to_image(
    models: Models,
    prompt: str,
    negative_prompt: str = "",
    *,
    width: int,
    height: int,
    steps: int = 20,
    seed: int = 0,
    guidance: float | None = 3.5,
    cfg_scale: float = 1.0,
    cfg_until: float = 0.0,
    solver: str = "euler",
    shift: str = "by size",
    batch_size: int = 1,
    on_step: Callable[[Step], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Tensor:
    """Images [batch_size, 3, height, width], float32, -1..1.

    The negative prompt counts only where `cfg_scale` is not 1, and at sigmas from 1 down to `cfg_until`.
    `on_step` is called after every step with latents in model space and may raise to interrupt; `on_notice`
    is called when a prompt is truncated, `on_report` with what the run cost, after the last step. `seed` also
    seeds the noise that a stochastic solver draws.
    Raises ValueError, before a model runs, for sides that are no positive multiples of 16, for unknown
    names and for values out of range.
    """
    # 1. Check the request before anything expensive happens.
    h, w = latent_size(width, height)
    method = solver_named(solver)
    cfg = Guidance(cfg_scale=cfg_scale, cfg_until=cfg_until)
    # 2. Draw the noise on the CPU, so that a seed gives the same image on every machine.
    noise = draw_noise(seed, batch_size, h, w)
    # 3. Make the schedule, shifted by the number of image tokens.
    sigmas = make_sigmas(steps, (h // 2) * (w // 2), shift=shift)
    # 4. Read the prompts with T5 and CLIP, as many tokens as the model was trained with.
    spec = models.transformer.spec
    _check_channels(spec.in_channels, 0)
    prompts = [prompt, negative_prompt] if cfg_scale != 1.0 else [prompt]
    texts = [
        replace(
            models.text_encoders.encode([text], on_notice=on_notice, txt_length=spec.txt_length),
            guidance=guidance,
        )
        for text in prompts
    ]
    # 5. Do once what does not depend on the image: text projection, rotary table, modulations of every sigma
    #    that is known beforehand.
    cfg = replace(cfg, negative=texts[1] if len(texts) > 1 else None)
    evaluated = method.evaluation_sigmas(sigmas)
    wanted = VelocityRequest(texts[0], evaluated, h, w, batch_size, cfg)
    velocity = guided_velocity(models.transformer, wanted)
    # 6. Follow the velocity from noise to image.
    start = noise.to(models.transformer.device)
    latent = integrate(
        method, velocity, start, sigmas, on_step, noise=seeded_noise(seed), on_report=on_report
    )
    # 7. Decode, out of the transformer's scale; in strips where memory is too small for one piece.
    image = decode(models.autoencoder, to_vae_space(latent).to(models.autoencoder.device))
    # 8. Clamp to the range of an image.
    return image.float().clamp(-1, 1)


def latent_size(width: int, height: int, largest: int | None = None) -> tuple[int, int]:
    """(h, w) of the latent of an image of that many pixels.

    Raises ValueError unless both divide by 16, and for a side above `largest`.
    """
    if width < 16 or height < 16 or width % 16 or height % 16:
        raise ValueError(
            f"width and height must be positive multiples of 16, got {width}x{height}; "
            f"{sizes_near(width, height)}"
        )
    if largest is not None and max(width, height) > largest:
        raise ValueError(
            f"width and height must be at most {largest}, got {width}x{height}; choose a smaller image"
        )
    return height // 8, width // 8


def sizes_near(width: int, height: int) -> str:
    """The nearest sizes below and above whose sides are multiples of 16: "128x112 and 144x128 are near"."""
    below = "x".join(str(max(16, side // 16 * 16)) for side in (width, height))
    above = "x".join(str(max(16, -(-side // 16) * 16)) for side in (width, height))
    return f"{below} is near" if below == above else f"{below} and {above} are near"


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed outside 0..2^64 - 1."""
    if not 0 <= seed < 2**64:
        raise ValueError(
            f"a seed must lie between 0 and 2^64 - 1, got {str(seed)[:200]}; "
            f"choose one up to {LARGEST_EXACT_SEED}, which browsers keep exactly"
        )


def draw_noise(seed: int, batch: int, h: int, w: int, convention: str = "comfyui") -> Tensor:
    """Standard normal noise [batch, 16, h, w], float32 on the CPU, in one draw.

    The values are those of torch.manual_seed(seed) and torch.randn, as ComfyUI draws them, without
    touching the global generator; with "reference" in bfloat16, as black-forest-labs/flux
    (src/flux/sampling.py: get_noise) and diffusers' FluxPipeline draw them. Raises ValueError for an empty
    batch, for a seed outside 0..2^64 - 1 and for another convention.
    """
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 image, got {batch}")
    check_seed(seed)
    if convention not in NOISE_CONVENTIONS:
        raise ValueError(
            f"noise is drawn by the convention {' or '.join(NOISE_CONVENTIONS)}, got {convention!r}"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = NOISE_CONVENTIONS[convention]
    return torch.randn(batch, LATENT_CHANNELS, h, w, generator=generator, dtype=dtype).float()


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
    attached to every pass, `groups` and `bias` are given to `FluxTransformer.prepare`; `extra` [B or 1, c, h,
    w] are channels that a model with more than 64 inputs reads beside the latent.
    """

    conditioning: Conditioning
    sigmas: Sequence[float] | None
    h: int
    w: int
    batch: int = 1
    guidance: Guidance = Guidance()
    new_cache: Callable[[], StepCache] | None = None
    hooks: Hooks = NO_HOOKS
    groups: tuple[TokenGroup, ...] = ()
    bias: Tensor | None = None
    extra: Tensor | None = None


@dataclass(frozen=True)
class SampleRequest:
    """One sampling run, all of it in model space.

    `noise` and `latent` are [B, 16, h, w], `sigmas` [steps + 1]; `noise_mask` (any sides; [H, W], [B, H, W]
    or [B, 1, H, W]; 1 where the image is to change) keeps the rest of `latent`. `seed`, as a rule that of
    `noise`, seeds the noise that a stochastic solver draws. `on_step` is called after every step and may
    raise to interrupt, `on_report` after the last one.
    """

    conditioning: Conditioning
    noise: Tensor
    latent: Tensor
    sigmas: Tensor
    solver: Solver
    guidance: Guidance = Guidance()
    noise_mask: Tensor | None = None
    seed: int = 0
    new_cache: Callable[[], StepCache] | None = None
    on_step: Callable[[Step], None] | None = None
    on_report: Callable[[Report], None] | None = None


@torch.no_grad()
def sample(transformer: FluxTransformer, request: SampleRequest) -> Tensor:
    """Latent [B, 16, h, w] in model space, started from the request's latent noised to sigmas[0].

    Raises ValueError when shapes disagree or the sigmas do not start above 0, and what `guided_velocity` and
    the solver raise.
    """
    noise, latent, sigmas, solver = request.noise, request.latent, request.sigmas, request.solver
    if noise.shape != latent.shape:
        raise ValueError(f"noise and latent must have one shape, got {[*noise.shape]} and {[*latent.shape]}")
    start = float(sigmas[0])
    if start <= 0.0:
        raise ValueError(f"sampling must start at a sigma above 0, got {start}")
    noise, latent = noise.to(transformer.device), latent.to(transformer.device)
    batch, _, h, w = latent.shape
    wanted = VelocityRequest(
        request.conditioning,
        solver.evaluation_sigmas(sigmas),
        h,
        w,
        batch,
        request.guidance,
        request.new_cache,
    )
    velocity = guided_velocity(transformer, wanted)
    if request.noise_mask is not None:
        velocity = masked_velocity(velocity, latent_mask(request.noise_mask, latent), noise, latent)
    x = (1 - start) * latent + start * noise
    random = seeded_noise(request.seed)
    return integrate(solver, velocity, x, sigmas, request.on_step, noise=random, on_report=request.on_report)


def guided_velocity(transformer: FluxTransformer, request: VelocityRequest) -> Velocity:
    """Velocity of latents [batch, 16, h, w] in model space, at the request's sigmas only; with None, at any.

    Both halves of classifier-free guidance share a batch; prompts of different lengths or distilled guidance,
    which cannot, are evaluated one after the other. A negative without distilled guidance takes the
    positive's. Raises ValueError for a model whose input channels are not the latent's and `extra`'s, a
    conditioning of another batch size, a step cache beside ControlNet residuals, and what
    `FluxTransformer.prepare` raises.
    """
    _check_channels(transformer.spec.in_channels, 0 if request.extra is None else request.extra.shape[1])
    guidance, sigmas, batch = request.guidance, request.sigmas, request.batch
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
    joined, h, w = _joined(texts, request.batch), request.h, request.w
    times = len(texts) // len(joined)  # rows of one image come once for each text that shares the pass
    groups = tuple(replace(group, tokens=_repeated(group.tokens, times)) for group in request.groups)
    bias = None if request.bias is None else _repeated(request.bias, times)
    prepared = [transformer.prepare(text, sigmas, h, w, groups, bias) for text in joined]
    if request.new_cache and any(isinstance(hook, Residuals) for hook in request.hooks.blocks):
        raise ValueError(
            "a step cache would reuse a ControlNet's residuals of earlier steps; use one or other"
        )
    caches = [None if request.new_cache is None else request.new_cache() for _ in joined]
    extra = None if request.extra is None else pack(request.extra.to(transformer.device))

    def velocities(x: Tensor, sigma: float) -> Tensor:
        tokens = pack(x)
        if extra is not None:
            tokens = torch.cat([tokens, extra.expand(len(tokens), -1, -1)], dim=-1)
        tokens = tokens.repeat(times, 1, 1)
        found = []
        for part, cache in zip(prepared, caches, strict=True):
            first = () if cache is None else (cache.hook(sigma),)
            hooks = replace(request.hooks, blocks=(*first, *request.hooks.blocks))
            found.append(transformer(tokens, part, sigma, hooks))
        return unpack(torch.cat(found), h, w).to(x.dtype)

    return velocities


def _repeated(rows: Tensor, times: int) -> Tensor:
    """[times B, ...] from [B, ...]; a single row serves every image and stays one."""
    return rows if len(rows) == 1 else rows.repeat(times, *[1] * (rows.ndim - 1))


def _check_channels(wanted: int, extra: int) -> None:
    """Raises ValueError unless a model with `wanted` inputs reads a latent and `extra` channels beside it."""
    given = 4 * (LATENT_CHANNELS + extra)
    if wanted != given:
        raise ValueError(
            f"the model has {wanted} input channels, got {given}; "
            "Fill, Canny and Depth models need an image, for text to image choose [dev] or [schnell]"
        )


def _for_batch(text: Conditioning, batch: int) -> Conditioning:
    """The conditioning, checked to be for one image or for each of the batch."""
    rows = text.txt.shape[0]
    vectors = rows if text.pooled is None else text.pooled.shape[0]
    if rows not in (1, batch) or vectors != rows:
        raise ValueError(
            f"a conditioning must be for 1 image or for all {batch}, got {rows} texts and "
            f"{vectors} pooled vectors; encode one prompt"
        )
    return text


def _form(text: Conditioning) -> tuple[object, ...]:
    """What two conditionings must have in common to share a batch."""
    return text.txt.shape[1:], None if text.pooled is None else text.pooled.shape[1:], text.guidance


def _joined(texts: list[Conditioning], batch: int) -> list[Conditioning]:
    """The conditionings as one of [2 batch] rows, where length and guidance allow, or else as they are."""
    if len(texts) == 1 or _form(texts[0]) != _form(texts[1]):
        return texts
    txt = torch.cat([text.txt.expand(batch, -1, -1) for text in texts])
    vectors = [text.pooled.expand(batch, -1) for text in texts if text.pooled is not None]
    pooled = torch.cat(vectors) if vectors else None
    return [Conditioning(txt, pooled, texts[0].guidance)]


def latent_mask(mask: Tensor, latent: Tensor) -> Tensor:
    """Mask [B or 1, 1, h, w], float32, on the latent's device, from one of any sides, as ComfyUI resizes it.

    Raises ValueError for a mask of another batch size.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:]).to(latent.device)
    if mask.shape[0] not in (1, latent.shape[0]):
        raise ValueError(f"a noise mask must be for 1 image or all {latent.shape[0]}, got {mask.shape[0]}")
    return F.interpolate(mask, size=latent.shape[-2:], mode="bilinear")


def masked_velocity(velocity: Velocity, mask: Tensor, noise: Tensor, latent: Tensor) -> Velocity:
    """The velocity that changes the image where `mask` is 1 and returns to `latent` where it is 0.

    Outside the mask the model sees the latent at the right noise level, sigma noise + (1 - sigma) latent,
    and its denoised result is replaced by the latent; what ComfyUI does, in the same order, so that soft
    masks agree too.
    """

    def masked(x: Tensor, sigma: float) -> Tensor:
        seen = mask * x + (1 - mask) * (sigma * noise + (1 - sigma) * latent)
        denoised = mask * (seen - sigma * velocity(seen, sigma)) + (1 - mask) * latent
        return (x - denoised) / sigma

    return masked
