"""Text to image in eight numbered steps: the only file that joins the stages.

`text_to_image` is the whole on one screen. `sample` is its middle for callers that bring their own noise,
schedule or image to start from, such as the nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory.tiling import decode
from .model.autoencoder import AutoEncoder, to_vae_space
from .model.spec import LATENT_CHANNELS, Conditioning, Velocity
from .model.text_encoders import TextEncoders
from .model.transformer import FluxTransformer
from .sampling.guidance import Guidance, VelocityRequest, check_channels, guided_velocity
from .sampling.schedule import make_sigmas
from .sampling.solver import Report, Solver, Step, integrate, seeded_noise, solver_named
from .sampling.step_cache import StepCache

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
    check_channels(spec, None)
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
