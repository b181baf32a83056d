"""FLUX.1's autoencoder: encodes an image to a 16-channel latent of an eighth of its sides, and decodes it.

Names are BFL's (black-forest-labs/flux, src/flux/modules/autoencoder.py). Images are [B, 3, H, W] in -1..1.
Latents are [B, 16, h, w] in one of two scales: raw, in VAE space, as the autoencoder returns them and as a
LATENT wire carries them, or in model space, where the transformer works: SCALE * (raw - SHIFT).

Activations are channels last in memory, where convolutions are fastest; shapes and values do not depend on
it. `channels_last` does the same for the weights, which each convolution would otherwise convert every time.
`decode` and `encode` here run in one piece; memory/tiling.py runs them in strips, within bounded memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backends import cpu_attention
from .group_norm import GroupNorm
from .spec import Shaped, count_blocks

SCALE = 0.3611
SHIFT = 0.1159


def to_model_space(raw: Tensor) -> Tensor:
    """Latent in model space, of about unit variance, from a raw one."""
    return SCALE * (raw - SHIFT)


def to_vae_space(latent: Tensor) -> Tensor:
    """Raw latent from one in model space, the inverse of `to_model_space`."""
    return latent / SCALE + SHIFT


MAX_LEVELS = 16
"""Limit on the levels of an autoencoder and on the residual blocks of a level."""


@dataclass(frozen=True)
class AutoEncoderSpec:
    """Sizes of the autoencoder.

    `ch` channels at full resolution, their multiple `ch_mult` at each level from there down, `num_res_blocks`
    residual blocks per level.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3

    @property
    def groups(self) -> int:
        """Groups of every GroupNorm: 32 as in FLUX, or 1 where `ch` is not a multiple of 32."""
        return 1 if self.ch % 32 else 32

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Shaped]) -> AutoEncoderSpec:
        """Sizes from the shapes of a state dict with BFL's names.

        Raises ValueError when it is not a FLUX.1 autoencoder.
        """
        for name in (
            "encoder.conv_in.weight",
            "encoder.down.0.block.0.conv1.weight",
            "decoder.conv_in.weight",
        ):
            if name not in state_dict:
                raise ValueError(
                    f"{name} is missing, which FLUX.1's autoencoder has; choose FLUX.1's ae.safetensors"
                )
        conv_in = state_dict["encoder.conv_in.weight"].shape
        ch = conv_in[0]
        levels, blocks = (
            count_blocks(state_dict, "encoder.down."),
            count_blocks(state_dict, "encoder.down.0.block."),
        )
        if max(levels, blocks) > MAX_LEVELS:  # building them would take minutes
            raise ValueError(
                f"FLUX.1's autoencoder has 4 levels of 2 blocks, got {levels} of {blocks}; "
                "choose FLUX.1's ae.safetensors"
            )
        widths = [state_dict[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        if not widths or any(width < ch or width % ch for width in widths):
            raise ValueError(
                f"the widths of an autoencoder's levels must be multiples of {ch}, got {widths}; "
                "choose FLUX.1's ae.safetensors"
            )
        return cls(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=blocks,
            z_channels=state_dict["decoder.conv_in.weight"].shape[1],
            in_channels=conv_in[1],
        )


def channels_last(model: nn.Module) -> None:
    """Convert the weights of a model's convolutions to channels-last memory, one at a time."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[2:] != (1, 1):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def norm_silu(x: Tensor, norm: GroupNorm) -> Tensor:
    """GroupNorm and SiLU, allocating one tensor."""
    return F.silu(norm(x), inplace=True)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, with a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(x, self.norm1))
        return self.conv2(norm_silu(h, self.norm2)).add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(part(normed), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        if cpu_attention.serves(q, k, v):
            attn = cpu_attention.attend(q, k, v)
        else:
            attn = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.proj_out(rearrange(attn, "b (h w) c -> b c h w", h=x.shape[2])).add_(x)


class Downsample(nn.Module):
    """Halve the sides: a strided convolution, padded at the right and bottom only, as FLUX's weights need."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbors and a 3x3 convolution, in 4/9 of their arithmetic.

    Of the 3 x 3 enlarged pixels under the kernel at most 2 x 2 differ, so the outputs of each parity are a
    convolution of the small input with a 2x2 kernel, whose weights are sums of the given ones.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, padding: int = 1) -> Tensor:
        """[B, C, 2 h, 2 w] of [B, C, h, w]; with `padding` 0, x has one more row above and one below."""
        batch, channels, height, width = x.shape
        height += 2 * padding - 2
        out = torch.empty(batch, channels, 2 * height, 2 * width, dtype=x.dtype, device=x.device).contiguous(
            memory_format=torch.channels_last
        )
        for (a, b), kernel in self.kernels().items():
            part = F.conv2d(x, kernel, self.conv.bias, padding=(padding, 1))
            out[:, :, a::2, b::2] = part[:, :, a : a + height, b : b + width]
        return out

    def kernels(self) -> dict[tuple[int, int], Tensor]:
        """2x2 kernels [C, C, 2, 2] by the parity of row and column, channels last in memory.

        An even output row has the kernel's first row on one input row and the sum of the others on the next;
        an odd one has the sum of the first two, and the last. The same holds for columns. All four are
        computed at once: one after the other, at 16 x 16, they took longer than the convolutions.
        """
        weight = self.conv.weight
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)).permute(0, 2, 3, 1)
        first, middle, last = exact.unbind(1)
        rows = torch.stack([first, middle + last, first + middle, last], dim=1)
        first, middle, last = rows.unbind(2)
        both = torch.stack([first, middle + last, first + middle, last], dim=2).to(weight.dtype)
        kernels = rearrange(both, "o (a y) (b x) i -> (a b) o y x i", a=2, b=2).permute(0, 1, 4, 2, 3)
        return dict(zip(((0, 0), (0, 1), (1, 0), (1, 1)), kernels, strict=True))


class Level(nn.Module):
    """The blocks of one resolution and the resampling to the next."""

    def __init__(self, blocks: list[ResnetBlock], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif resample is not None:
            self.upsample = resample

    @property
    def resample(self) -> Downsample | Upsample | None:
        """The resampling to the next level, None at the last one."""
        return getattr(self, "upsample", None) or getattr(self, "downsample", None)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part if isinstance(part, nn.ModuleList) else [part]:
                x = layer(x)
        return x


class Mid(nn.Module):
    """A residual block, attention and a residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> means and log variances of the latent [B, 2 z, H/8, W/8]."""

    def __init__(self, spec: AutoEncoderSpec) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = nn.Conv2d(spec.in_channels, spec.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([spec.ch, *widths], widths, strict=False)):
            blocks = [
                ResnetBlock(width if j else before, width, spec.groups) for j in range(spec.num_res_blocks)
            ]
            self.down.append(Level(blocks, Downsample(width) if i < len(widths) - 1 else None))
        self.mid = Mid(widths[-1], spec.groups)
        self.norm_out = GroupNorm(spec.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.mid(x), self.norm_out))


class Decoder(nn.Module):
    """Raw latent [B, z, h, w] -> image [B, 3, 8 h, 8 w].

    As in BFL's file, `up[0]` is the level of full resolution, so the levels run in reverse.
    """

    def __init__(self, spec: AutoEncoderSpec) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = nn.Conv2d(spec.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], spec.groups)
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            blocks = [
                ResnetBlock(width if j else before, width, spec.groups)
                for j in range(spec.num_res_blocks + 1)
            ]
            self.up.append(Level(blocks, Upsample(width) if i else None))
        self.norm_out = GroupNorm(spec.groups, spec.ch * spec.ch_mult[0], eps=1e-6)
        self.conv_out = nn.Conv2d(spec.ch * spec.ch_mult[0], spec.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(x, self.norm_out))


class AutoEncoder(nn.Module):
    """FLUX.1's autoencoder, sized by `spec`."""

    def __init__(self, spec: AutoEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side: 8 in FLUX.1."""
        return 2 ** (len(self.spec.ch_mult) - 1)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latent, each [B, 16, h, w], of images [B, 3, H, W] in -1..1."""
        mean, log_variance = self.encoder(image.to(self.dtype)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, image: Tensor) -> Tensor:
        """Raw latent [B, 16, h, w] (the posterior's mean, as in BFL) of images [B, 3, H, W] in -1..1.

        Raises ValueError when a side is not a multiple of 8, or there are not 3 channels.
        """
        self.check_image(image)
        return self.posterior(image)[0]

    def decode(self, raw: Tensor) -> Tensor:
        """Images [B, 3, H, W], about -1..1 (not clamped), of raw latents [B, 16, h, w].

        Raises ValueError for a wrong number of channels.
        """
        self.check_latent(raw)
        return self.decoder(raw.to(self.dtype))

    def check_image(self, image: Tensor) -> None:
        """Raises ValueError for an image that `encode` does not accept."""
        channels, height, width = image.shape[1:]
        if channels != self.spec.in_channels:
            raise ValueError(
                f"an image must have {self.spec.in_channels} channels to be encoded, got {channels}"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the image's sides must be multiples of {self.factor} to be encoded, "
                f"got {width}x{height}; resize or crop it first"
            )

    def check_latent(self, raw: Tensor) -> None:
        """Raises ValueError for a latent that `decode` does not accept."""
        if raw.shape[1] != self.spec.z_channels:
            raise ValueError(
                f"this autoencoder decodes latents of {self.spec.z_channels} channels, got {raw.shape[1]}; "
                "wire in a FLUX.1 latent"
            )
