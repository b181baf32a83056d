"""Sizes of a FLUX.1 transformer, what it is conditioned on, and the letters in which flux_core writes shapes.

Legend: B batch, H W pixels, h w = H/8 W/8, N = (H/16)(W/16) image tokens, L text tokens, K heads, D head dim,
C width of the T5 sequence, P width of the pooled CLIP vector, S number of sigmas. Square brackets are shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hooks import Residuals

Velocity = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> dx/dsigma = noise - image, of the shape of x: all that a solver sees of a model."""


class Shaped(Protocol):
    """A tensor, or a weight in another format: anything whose sizes can be read."""

    @property
    def shape(self) -> torch.Size: ...


@dataclass(frozen=True)
class TokenGroup:
    """Tokens behind the generated ones that the model attends to, such as a reference image (Kontext).

    `tokens` [B or 1, n, in_channels] are packed latents with position ids `ids` [n, 3]. With `sigma` they are
    modulated as at that noise level at every step; None: at the step's own. `strength` scales how much all
    other tokens attend to them (log strength is added to their scores): 1 changes nothing, 0 leaves the group
    out.
    """

    tokens: Tensor
    ids: Tensor
    sigma: float | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class TextSpan:
    """The text tokens `start` to `stop` - 1, such as an image prompt (Redux), and their `strength`.

    Image tokens and the text before the span attend to it with log strength added to their scores.
    """

    start: int
    stop: int
    strength: float


ResidualsAt = Callable[[Tensor, float], "Residuals | None"]
"""(tokens [B, N, 64] of the latent, sigma) -> residuals for the block loop, None where there are none."""


class ControlBranch(Protocol):
    """A network beside the transformer that adds residuals to its blocks, such as a ControlNet in use."""

    def begin(
        self, conditioning: Conditioning, sigmas: Sequence[float] | None, h: int, w: int
    ) -> ResidualsAt:
        """What does not depend on the image, once per run; `sigmas` and sizes as for `prepare`."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What one pass of the network is conditioned on: an encoded prompt, and images beside it.

    `txt` [B, L, C] and `pooled` [B, P] (None: zeros) come from the text encoders, `guidance` is the distilled
    one. `extra` [B or 1, c, h, w] are channels that a model with more than 64 inputs reads beside the latent
    (Fill, Canny, Depth), `groups` tokens behind the image's (Kontext), `spans` strengths of parts of the
    text (Redux), `controls` add residuals (ControlNet). `bias` [B or 1, K or 1, S, S], over text, image and
    groups, is added to the attention scores.
    """

    txt: Tensor
    pooled: Tensor | None
    guidance: float | None = None
    extra: Tensor | None = None
    groups: tuple[TokenGroup, ...] = ()
    spans: tuple[TextSpan, ...] = ()
    controls: tuple[ControlBranch, ...] = ()
    bias: Tensor | None = None


LATENT_CHANNELS = 16
"""Channels of a latent."""

CONTROL_CHANNELS = 128
"""A token's input channels in FLUX.1 Canny and Depth: 64 noise, 64 control image."""

FILL_CHANNELS = 384
"""A token's input channels in FLUX.1 Fill: 64 noise, 64 masked image, 256 mask."""


@dataclass(frozen=True)
class FluxSpec:
    """Sizes of a FLUX.1 transformer (black-forest-labs/flux, src/flux/model.py: FluxParams).

    `in_channels` and `out_channels` count a token's inputs (64 for [dev] and [schnell], 384 for Fill) and
    outputs.
    """

    hidden_size: int
    num_heads: int
    depth: int
    depth_single: int
    context_in: int
    vec_in: int
    in_channels: int = 64
    out_channels: int = 64
    mlp_ratio: float = 4.0
    guidance_embed: bool = False
    theta: int = 10_000

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                "heads must have a multiple of 32 dims for the three rotary axes, "
                f"got {self.num_heads} heads over a hidden size of {self.hidden_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Head dims rotated by (image index, row, column), FLUX.1's 16, 56, 56 of 128 in proportion."""
        first = self.head_dim // 8
        rest = (self.head_dim - first) // 2
        return first, rest, rest

    @property
    def is_fill(self) -> bool:
        """Whether it reads a masked image and a mask beside the latent."""
        return self.in_channels >= FILL_CHANNELS

    @property
    def txt_length(self) -> int:
        """The number of T5 tokens that FLUX.1's pipelines use: 512, for [schnell] 256, for Fill 128."""
        if self.is_fill:
            return 128
        return 512 if self.guidance_embed else 256

    def check_reference(self, channels: int) -> None:
        """Raises ValueError unless a token of a reference, of `channels` values, fits the model."""
        if channels != self.in_channels:
            raise ValueError(
                f"the model reads tokens of {self.in_channels} values, a reference has {channels}; Canny, "
                "Depth and Fill models take no references, choose Kontext"
            )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Shaped]) -> FluxSpec:
        """Sizes read from the shapes of a state dict with BFL's names.

        Raises ValueError unless it belongs to a FLUX.1 transformer.
        """
        needed = (
            "img_in.weight",
            "txt_in.weight",
            "vector_in.in_layer.weight",
            "final_layer.linear.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "double_blocks.0.img_mlp.0.weight",
        )
        missing = [name for name in needed if name not in state_dict]
        if missing:
            raise ValueError(
                f"a FLUX.1 transformer has {missing[0]}, which is missing; choose a file of the whole model"
            )
        img_in = state_dict["img_in.weight"].shape
        hidden = img_in[0]
        head_dim = state_dict["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
        return cls(
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            depth=count_blocks(state_dict, "double_blocks."),
            depth_single=count_blocks(state_dict, "single_blocks."),
            context_in=state_dict["txt_in.weight"].shape[1],
            vec_in=state_dict["vector_in.in_layer.weight"].shape[1],
            in_channels=img_in[1],
            out_channels=state_dict["final_layer.linear.weight"].shape[0],
            mlp_ratio=state_dict["double_blocks.0.img_mlp.0.weight"].shape[0] / hidden,
            guidance_embed="guidance_in.in_layer.weight" in state_dict,
        )


def count_blocks(state_dict: Mapping[str, Shaped], prefix: str) -> int:
    """How many numbered blocks the state dict holds under `prefix`."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in state_dict if name.startswith(prefix)})


FLUX_DEV = FluxSpec(3072, 24, 19, 38, context_in=4096, vec_in=768, guidance_embed=True)
FLUX_SCHNELL = FluxSpec(3072, 24, 19, 38, context_in=4096, vec_in=768)
