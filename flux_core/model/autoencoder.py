"""FLUX.1's autoencoder: an image in, a 16-channel latent at an eighth of its sides out, and back.

Names are BFL's (black-forest-labs/flux, src/flux/modules/autoencoder.py). Images are [B, 3, H, W] in -1..1.
Latents are [B, 16, h, w] and come in two scales: raw, as the autoencoder makes them and as node editors pass
them about, and model space, where the transformer works: SCALE * (raw - SHIFT).

Activations lie channels last in memory, where convolutions are fastest; shapes and values are as ever. So do
kernels once `channels_last` has seen to it, or each convolution would turn its own round every time.
`decode` and `encode` here take a picture in one piece; tiling.py does it in strips, within bounded memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backends import cpu_attention as attention_cpu
from .group_norm import GroupNorm
from .spec import Shaped

SCALE = 0.3611
SHIFT = 0.1159


def to_model_space(raw: Tensor) -> Tensor:
    """Latent as the transformer sees it, about unit variance, from a raw one."""
    return SCALE * (raw - SHIFT)


def to_vae_space(latent: Tensor) -> Tensor:
    """Raw latent from one in model space: the inverse of `to_model_space`."""
    return latent / SCALE + SHIFT


@dataclass(frozen=True)
class AutoEncoderSpec:
    """Sizes of the autoencoder.

    Base channels `ch`, their multiple at each level from full resolution down, residual blocks a level.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3

    @property
    def groups(self) -> int:
        """Groups of every GroupNorm: FLUX's 32, and one where 32 do not divide the channels."""
        return 1 if self.ch % 32 else 32

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Shaped]) -> AutoEncoderSpec:
        """Sizes read off a state dict with BFL's names.

        Raises ValueError when it is no autoencoder of FLUX.1's kind.
        """
        for name in (
            "encoder.conv_in.weight",
            "encoder.down.0.block.0.conv1.weight",
            "decoder.conv_in.weight",
        ):
            if name not in state_dict:
                raise ValueError(
                    f"not a FLUX.1 autoencoder: it has no {name}; choose FLUX.1's ae.safetensors"
                )
        conv_in = state_dict["encoder.conv_in.weight"].shape
        ch = conv_in[0]
        levels = _count(state_dict, "encoder.down.")
        widths = [state_dict[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        if not widths or any(width < ch or width % ch for width in widths):
            raise ValueError(
                f"the widths of an autoencoder's levels must be multiples of {ch}, got {widths}; "
                "choose FLUX.1's ae.safetensors"
            )
        return cls(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=_count(state_dict, "encoder.down.0.block."),
            z_channels=state_dict["decoder.conv_in.weight"].shape[1],
            in_channels=conv_in[1],
        )


def _count(state_dict: Mapping[str, Shaped], prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in state_dict if name.startswith(prefix)})


def channels_last(model: nn.Module) -> None:
    """Lay the kernels of a model's convolutions channels last in memory, one at a time."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[2:] != (1, 1):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def activated(x: Tensor, norm: GroupNorm) -> Tensor:
    """SiLU of a normed activation, in one new tensor."""
    return F.silu(norm(x), inplace=True)


class ResnetBlock(nn.Module):
    """Two normed 3x3 convolutions around a shortcut."""

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
        h = self.conv1(activated(x, self.norm1))
        return self.conv2(activated(h, self.norm2)).add_(self.nin_shortcut(x))


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
        if attention_cpu.serves(q, k, v):
            attn = attention_cpu.attend(q, k, v)
        else:
            attn = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.proj_out(rearrange(attn, "b (h w) c -> b c h w", h=x.shape[2])).add_(x)


class Downsample(nn.Module):
    """Halve the sides: a strided convolution, padded at right and bottom only, as FLUX's weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbours, then a 3x3 convolution, in 4/9 of the arithmetic that this takes.

    Of the 3 x 3 pixels under the kernel at most 2 x 2 differ, so the outputs of each parity are a convolution
    of the small picture with a 2x2 kernel, whose weights are sums of the given ones.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, padding: int = 1) -> Tensor:
        """[B, C, 2 h, 2 w] of [B, C, h, w]; with `padding` 0, x has a row more above and one more below."""
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

        All of them at once: at 16 x 16, one after the other, they took longer than the convolutions. Of three
        rows an even output's pair of pixels meets the first, and the sum of the others; an odd one's the
        sum of the first two, and the last. So do columns.
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
    """The blocks at one resolution and the change to the next."""

    def __init__(self, blocks: list[ResnetBlock], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif resample is not None:
            self.upsample = resample

    @property
    def resample(self) -> Downsample | Upsample | None:
        """The change to the next level, None at the last one."""
        return getattr(self, "upsample", None) or getattr(self, "downsample", None)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part if isinstance(part, nn.ModuleList) else [part]:
                x = layer(x)
        return x


class Mid(nn.Module):
    """Two residual blocks around attention, at the lowest resolution."""

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
        return self.conv_out(activated(self.mid(x), self.norm_out))


class Decoder(nn.Module):
    """Raw latent [B, z, h, w] -> image [B, 3, 8 h, 8 w].

    `up` is numbered from full resolution, and walked backwards.
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
        return self.conv_out(activated(x, self.norm_out))


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
        """Pixels to a latent position along each side: 8 in FLUX.1."""
        return 2 ** (len(self.spec.ch_mult) - 1)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latent, each [B, 16, h, w], of images [B, 3, H, W] in -1..1."""
        mean, log_variance = self.encoder(image.to(self.dtype)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, image: Tensor) -> Tensor:
        """Raw latent [B, 16, h, w] (the posterior's mean, as in BFL) of images [B, 3, H, W] in -1..1.

        Raises ValueError when a side is not a multiple of 16, or there are not 3 channels.
        """
        self.check_image(image)
        return self.posterior(image)[0]

    def decode(self, raw: Tensor) -> Tensor:
        """Images [B, 3, H, W], about -1..1 (not clamped), of raw latents [B, 16, h, w].

        Raises ValueError when the latent has another number of channels.
        """
        self.check_latent(raw)
        return self.decoder(raw.to(self.dtype))

    def check_image(self, image: Tensor) -> None:
        """Raises ValueError for an image that `encode` does not take."""
        channels, height, width = image.shape[1:]
        if channels != self.spec.in_channels:
            raise ValueError(
                f"an image must have {self.spec.in_channels} channels to be encoded, got {channels}"
            )
        if height % (2 * self.factor) or width % (2 * self.factor):
            raise ValueError(
                f"the image's sides must be multiples of {2 * self.factor} to be encoded, "
                f"got {width}x{height}; resize or crop it first"
            )

    def check_latent(self, raw: Tensor) -> None:
        """Raises ValueError for a latent that `decode` does not take."""
        if raw.shape[1] != self.spec.z_channels:
            raise ValueError(
                f"this autoencoder decodes latents of {self.spec.z_channels} channels, got {raw.shape[1]}; "
                "wire in a FLUX.1 latent"
            )
