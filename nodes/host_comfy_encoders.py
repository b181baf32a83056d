"""Our text encoders as ComfyUI calls them: `CLIP.cond_stage_model` and `CLIP.tokenizer`.

Texts of ComfyUI's own nodes are read as by its own FLUX encoders: with weights, T5 padded to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core.model.prompts import COMFY, LITERAL, fit, reading_notices, syntax_notices
from ..flux_core.model.text_encoders import T5_LENGTH, TextEncoders
from ..flux_core.weights import check_unchanged
from .wires import checked_finite

SECOND_NAME = "t5xxl.transformer.encoder.embed_tokens.weight"
"""T5's embedding once more: a file cannot hold one tensor under two names."""

COMFY_T5_LENGTH = 256
"""Tokens to which ComfyUI pads T5's text at least."""


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
        self._layer = -1

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the second name of T5's embedding."""
        tensors = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(SECOND_NAME)}

    def reset_clip_options(self) -> None:
        self._layer = -1

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """The layer whose state T5 returns; CLIP's vector is always the last one's, as in ComfyUI."""
        layer = options.get("layer")
        if layer is not None:
            self._layer = layer if -self.encoders.t5.config.num_layers <= layer < 0 else -1

    def check_unchanged(self) -> None:
        """Raise ValueError when a file that the weights are mapped from has changed."""
        check_unchanged(self.encoders.t5, self.encoders.clip)

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(txt [1, L, C], pooled [1, P]), on the CPU, of the output of `PromptTokens`."""
        self.check_unchanged()
        notices = [note for name in ("t5xxl", "l") for note in getattr(tokens[name], "notices", ())]
        if notices:
            self.on_notice("\n".join(dict.fromkeys(notices)))
        rows = [[(*token, 0)[:3] for token in row] for row in tokens["t5xxl"]]
        ids = torch.tensor([[token[0] for token in tokens["l"][0]]])
        with torch.no_grad():
            parts = [self.encoders.encode_tokens([row], len(row), self._layer) for row in rows]
            txt, pooled = torch.cat(parts, dim=1), self.encoders.encode_clip(ids)
        for values, encoder in ((txt, self.encoders.t5), (pooled, self.encoders.clip)):
            checked_finite(values, "the text encoders' values", "load other text encoders", encoder)
        return txt.cpu(), pooled.cpu()


class TokenRows(list[list[tuple[Any, ...]]]):
    """Rows of (id, weight) for one encoder, with notices of what in the text has no effect."""

    def __init__(self, rows: Iterable[list[tuple[Any, ...]]], notices: Iterable[str]) -> None:
        super().__init__(rows)
        self.notices = tuple(notices)


class PromptTokens:
    """`CLIP.tokenizer`: reads a text as ComfyUI's own does (sd1_clip.py), by the encoders' tokenizers."""

    def __init__(self, encoders: TextEncoders) -> None:
        self.encoders = encoders

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        tokenizer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, TokenRows]:
        """Rows of (id, weight), or (id, weight, word), for "l" and "t5xxl".

        T5 is padded to 256 tokens and not truncated, unless the encoder has a length of its own, or the
        options state another one (T5TokenizerOptions).
        """
        encoders, options = self.encoders, {**(tokenizer_options or {}), **kwargs}
        weights = LITERAL if options.get("disable_weights") else COMFY
        t5, clip = encoders.t5_reader.read(text, weights), encoders.clip_reader.read(text, weights)
        own = None if encoders.txt_length == T5_LENGTH else encoders.txt_length
        least = options.get("min_length", options.get("t5xxl_min_length", own or COMFY_T5_LENGTH))
        length = max(t5.needed + options.get("t5xxl_min_padding", 0), least)
        t5_row = fit(t5.rows()[0], length if own is None else min(length, own), (encoders.t5_pad, 1.0, 0))
        limit = encoders.clip_length
        clip_rows = [fit(row, limit, (encoders.clip_end, 1.0, 0)) for row in clip.rows(limit)]
        last = 3 if return_word_ids else 2
        syntax = syntax_notices([text], weights)
        return {
            name: TokenRows(
                [[token[:last] for token in row] for row in rows],
                [*syntax, *reading_notices([reading], [bound])],
            )
            for name, rows, reading, bound in (("l", clip_rows, clip, limit), ("t5xxl", [t5_row], t5, own))
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {}
