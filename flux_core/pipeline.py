"""Text to image in eight numbered steps: the only file that joins the stages.

`text_to_image` is the whole on one screen. `sample` is its middle for callers that bring their own noise,
schedule or picture to start from, such as the nodes; `guided_velocity` is all that a solver sees of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory.tiling import decode
from .model.autoencoder import AutoEncoder, to_vae_space
from .model.spec import Conditioning, Velocity
from .model.text_encoders import TextEncoders
from .model.transformer import FluxTransformer, Memory, pack, unpack
from .sampling.schedule import make_sigmas
from .sampling.solver import Report, Solver, Step, integrate, seeded_noise, solver_named

LATENT_CHANNELS = 16
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
    is told when a prompt is cut short; `on_report` what the run cost, after the last step. `seed` also gives
    the noise that a stochastic solver draws on its way.
    Raises ValueError, before a model runs, for sides that are no positive multiples of 16, for unknown
    names and for numbers out of range.
    """
    # 1. Check the request before anything expensive happens.
    h, w = latent_size(width, height)
    method = solver_named(solver)
    # 2. Draw the noise on the CPU, so that a seed means the same picture on every machine.
    noise = draw_noise(seed, batch_size, h, w)
    # 3. Make the schedule, shifted by the number of image tokens.
    sigmas = make_sigmas(steps, (h // 2) * (w // 2), shift=shift)
    # 4. Read the prompts with T5 and CLIP.
    prompts = [prompt, negative_prompt] if cfg_scale != 1.0 else [prompt]
    texts = [
        replace(models.text_encoders.encode([text], on_notice=on_notice), guidance=guidance)
        for text in prompts
    ]
    # 5. Do once what does not depend on the image: text projection, rotary table, modulations of every sigma
    #    that is known beforehand.
    negative = texts[1] if len(texts) > 1 else None
    asked = method.evaluation_sigmas(sigmas)
    velocity = guided_velocity(
        models.transformer, texts[0], negative, cfg_scale, asked, h, w, batch_size, cfg_until=cfg_until
    )
    # 6. Follow the velocity from noise to picture.
    start = noise.to(models.transformer.device)
    latent = integrate(
        method, velocity, start, sigmas, on_step, noise=seeded_noise(seed), on_report=on_report
    )
    # 7. Decode, out of the transformer's scale; in strips where there is no room for it in one piece.
    image = decode(models.autoencoder, to_vae_space(latent).to(models.autoencoder.device))
    # 8. Keep within the range of a picture.
    return image.float().clamp(-1, 1)


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(h, w) of the latent of a picture of that many pixels. Raises ValueError unless both divide by 16."""
    if width < 16 or height < 16 or width % 16 or height % 16:
        nearest = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise ValueError(
            f"width and height must be positive multiples of 16, got {width}x{height}; {nearest} is near"
        )
    return height // 8, width // 8


def draw_noise(seed: int, batch: int, h: int, w: int, convention: str = "comfyui") -> Tensor:
    """Standard normal noise [batch, 16, h, w], float32 on the CPU, in one draw.

    The numbers are those of torch.manual_seed(seed) and torch.randn, as ComfyUI draws them, without
    touching the global generator; with "reference" in bfloat16, as black-forest-labs/flux
    (src/flux/sampling.py: get_noise) and diffusers' FluxPipeline draw them. Raises ValueError for an empty
    batch, for a seed outside 0..2^64 - 1 and for another convention.
    """
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 picture, got {batch}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must lie between 0 and 2^64 - 1, got {seed}")
    if convention not in NOISE_CONVENTIONS:
        raise ValueError(
            f"noise is drawn by the convention {' or '.join(NOISE_CONVENTIONS)}, got {convention!r}"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = NOISE_CONVENTIONS[convention]
    return torch.randn(batch, LATENT_CHANNELS, h, w, generator=generator, dtype=dtype).float()


@torch.no_grad()
def sample(
    transformer: FluxTransformer,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg_scale: float,
    noise: Tensor,
    latent: Tensor,
    sigmas: Tensor,
    solver: Solver,
    on_step: Callable[[Step], None] | None = None,
    noise_mask: Tensor | None = None,
    *,
    seed: int = 0,
    on_report: Callable[[Report], None] | None = None,
    memory: Callable[[], Memory] | None = None,
    cfg_until: float = 0.0,
) -> Tensor:
    """Latent [B, 16, h, w] in model space, started from `latent` noised to sigmas[0].

    `noise` and `latent` are [B, 16, h, w] in model space. `noise_mask` (any sides; [H, W], [B, H, W] or
    [B, 1, H, W]; 1 where the picture is to change) keeps the rest of `latent`. `seed`, as a rule that of
    `noise`, gives what a stochastic solver draws on its way (see `seeded_noise`). `memory` and `cfg_until`:
    see `guided_velocity`. Raises ValueError when shapes disagree or the sigmas do not start above 0, and what
    the solver raises.
    """
    if noise.shape != latent.shape:
        raise ValueError(f"noise and latent must have one shape, got {[*noise.shape]} and {[*latent.shape]}")
    start = float(sigmas[0])
    if start <= 0.0:
        raise ValueError(f"sampling must start at a sigma above 0, got {start}")
    noise, latent = noise.to(transformer.device), latent.to(transformer.device)
    batch, _, h, w = latent.shape
    asked = solver.evaluation_sigmas(sigmas)
    velocity = guided_velocity(
        transformer, positive, negative, cfg_scale, asked, h, w, batch, memory=memory, cfg_until=cfg_until
    )
    if noise_mask is not None:
        velocity = masked_velocity(velocity, latent_mask(noise_mask, latent), noise, latent)
    x = (1 - start) * latent + start * noise
    return integrate(solver, velocity, x, sigmas, on_step, noise=seeded_noise(seed), on_report=on_report)


def guided_velocity(
    transformer: FluxTransformer,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg_scale: float,
    sigmas: Sequence[float] | None,
    h: int,
    w: int,
    batch: int,
    memory: Callable[[], Memory] | None = None,
    cfg_until: float = 0.0,
) -> Velocity:
    """Velocity of latents [batch, 16, h, w] in model space, at the given sigmas only; with None, at any.

    True classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), v_neg + cfg_scale (v_pos -
    v_neg), with both halves in one batch; without `negative` or at scale 1 the positive half alone, and so at
    sigmas below `cfg_until`: what the picture shows is settled above, and the last steps take half the work
    (guidance in a limited interval, Kynkäänniemi et al. 2024, arXiv:2404.07724). Texts of different lengths
    or guidance, which cannot share a batch, go one after the other. A negative without a distilled guidance
    takes the positive's. `memory` makes what each pass keeps of its steps, so as to skip
    some (caching.py). Raises ValueError for a model with extra input channels, a conditioning of another
    batch size, and what `FluxTransformer.prepare` raises.
    """
    if transformer.spec.in_channels != 4 * LATENT_CHANNELS:
        raise ValueError(
            f"text to image needs a model with 64 input channels, got {transformer.spec.in_channels}; "
            "Fill, Canny and Depth models also want a picture, choose FLUX.1 [dev] or [schnell]"
        )
    positive = _for_batch(positive, batch)

    def passes(texts: list[Conditioning], asked: Sequence[float] | None) -> Velocity:
        """The velocities of the texts, [texts * batch, 16, h, w], in one pass where they can share one."""
        joined = _joined(texts, batch)
        prepared = [transformer.prepare(text, asked, h, w) for text in joined]
        memories = [None if memory is None else memory() for _ in joined]

        def velocities(x: Tensor, sigma: float) -> Tensor:
            tokens = pack(x).repeat(len(texts) // len(joined), 1, 1)
            parts = zip(prepared, memories, strict=True)
            found = torch.cat([transformer(tokens, part, sigma, kept) for part, kept in parts])
            return unpack(found, h, w).to(x.dtype)

        return velocities

    low = sigmas if sigmas is None else [sigma for sigma in sigmas if sigma < cfg_until]
    high = sigmas if sigmas is None else [sigma for sigma in sigmas if sigma >= cfg_until]
    if negative is None or cfg_scale == 1.0 or high == []:
        velocity = passes([positive], sigmas)
    else:
        if negative.guidance is None:
            negative = replace(negative, guidance=positive.guidance)
        both = passes([positive, _for_batch(negative, batch)], high)
        alone = passes([positive], low) if low != [] and cfg_until > 0.0 else None

        def guided(x: Tensor, sigma: float) -> Tensor:
            if alone is not None and sigma < cfg_until:
                return alone(x, sigma)
            v_pos, v_neg = both(x, sigma).chunk(2)
            return v_neg + cfg_scale * (v_pos - v_neg)

        velocity = guided
    return velocity


def _for_batch(text: Conditioning, batch: int) -> Conditioning:
    """The conditioning, checked to be for one picture or for each of the batch."""
    rows = text.txt.shape[0]
    if rows not in (1, batch) or text.pooled.shape[0] != rows:
        raise ValueError(
            f"a conditioning must be for 1 picture or for all {batch}, got {rows} texts and "
            f"{text.pooled.shape[0]} pooled vectors; encode one prompt"
        )
    return text


def _joined(texts: list[Conditioning], batch: int) -> list[Conditioning]:
    """The conditionings as one of [2 batch] rows, where length and guidance allow, or else as they are."""
    if (
        len(texts) == 1
        or texts[0].txt.shape[1] != texts[1].txt.shape[1]
        or texts[0].guidance != texts[1].guidance
    ):
        return texts
    txt = torch.cat([text.txt.expand(batch, -1, -1) for text in texts])
    pooled = torch.cat([text.pooled.expand(batch, -1) for text in texts])
    return [Conditioning(txt, pooled, texts[0].guidance)]


def latent_mask(mask: Tensor, latent: Tensor) -> Tensor:
    """Mask [B or 1, 1, h, w], float32, on the latent's device, from one of any sides, as ComfyUI resizes it.

    Raises ValueError for a mask of another batch size.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:]).to(latent.device)
    if mask.shape[0] not in (1, latent.shape[0]):
        raise ValueError(f"a noise mask must be for 1 picture or all {latent.shape[0]}, got {mask.shape[0]}")
    return F.interpolate(mask, size=latent.shape[-2:], mode="bilinear")


def masked_velocity(velocity: Velocity, mask: Tensor, noise: Tensor, latent: Tensor) -> Velocity:
    """The velocity that changes the picture where `mask` is 1 and returns to `latent` where it is 0.

    Outside the mask the model sees the latent at the right noise level, sigma noise + (1 - sigma) latent,
    and its denoised picture is replaced by the latent; what ComfyUI does, in the same order, so that soft
    masks agree too.
    """

    def masked(x: Tensor, sigma: float) -> Tensor:
        seen = mask * x + (1 - mask) * (sigma * noise + (1 - sigma) * latent)
        denoised = mask * (seen - sigma * velocity(seen, sigma)) + (1 - mask) * latent
        return (x - denoised) / sigma

    return masked
