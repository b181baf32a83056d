"""Latents to tokens and back, and the positions of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def pack(latent: Tensor) -> Tensor:
    """Tokens [B, N, 4 c] from a latent [B, c, h, w]: each 2x2 patch is one token, ordered (c ph pw).

    Raises ValueError when h or w is odd.
    """
    h, w = latent.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(
            f"latent height and width must be even to pack 2x2, got {h}x{w}; "
            "make the image's sides multiples of 16"
        )
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Latent [B, c, h, w] from tokens [B, N, 4 c]: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h // 2, w=w // 2, ph=2, pw=2)


def image_ids(h: int, w: int) -> Tensor:
    """Position ids [N, 3], float32, of the tokens of an h x w latent: (0, row, column)."""
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] = torch.arange(h // 2)[:, None]
    ids[..., 2] = torch.arange(w // 2)[None, :]
    return rearrange(ids, "h w i -> (h w) i")


def position_ids(txt_length: int, h: int, w: int) -> Tensor:
    """Ids [L + N, 3], float32: zeros for the text, (0, row, column) for the tokens of an h x w latent."""
    return torch.cat([torch.zeros(txt_length, 3), image_ids(h, w)])


def pad_to_even(latent: Tensor) -> Tensor:
    """The latent [B, c, h, w] with odd sides made even: its first row or column again behind the last.

    ComfyUI does the same (comfy/ldm/common_dit.py, pad_to_patch_size). Crop the result back to h x w.
    """
    h, w = latent.shape[-2:]
    return F.pad(latent, (0, w % 2, 0, h % 2), mode="circular") if h % 2 or w % 2 else latent
