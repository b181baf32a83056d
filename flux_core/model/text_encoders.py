"""Encodes prompts with FLUX.1's two text encoders: T5 returns a vector per token, CLIP one for the prompt.

The encoders are those of `transformers`, imported only when a model is built. This file adds what FLUX needs:
T5 padded to a fixed length without an attention mask, CLIP's hidden state at the end of the text, and model
sizes from the shapes in a file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .spec import Conditioning, Shaped, count_blocks

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

log = logging.getLogger(__name__)

T5_LENGTH = 512
"""Tokens to which FLUX.1 [dev] pads the T5 text; [schnell] uses 256, Fill 128."""
T5_BUCKETS = 32
"""Rows of every T5's relative_attention_bias: one for each bucket of distances."""
MAX_LAYERS = 1000
"""Limit on the layers of an encoder: building more would take minutes."""
NO_PADDING = 0
"""As `txt_length`: do not pad; use the prompt's own token count."""


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a prompt has, end marks included, and how many the encoder reads."""

    encoder: str
    needed: int
    limit: int


class TextEncoders:
    """FLUX.1's two text encoders with their tokenizers, whose templates add the end marks."""

    def __init__(
        self,
        t5: T5EncoderModel,
        t5_tokenizer: Tokenizer,
        clip: CLIPTextModel,
        clip_tokenizer: Tokenizer,
        txt_length: int = T5_LENGTH,
    ) -> None:
        self.t5, self.t5_tokenizer, self.txt_length = t5, t5_tokenizer, txt_length
        self.clip, self.clip_tokenizer = clip, clip_tokenizer
        self.clip_length: int = clip.config.max_position_embeddings
        end = clip.config.eos_token_id
        if not isinstance(end, int):
            raise ValueError(f"CLIP's config must have one integer eos_token_id, got {end}")
        self.clip_end = end
        for tokenizer in (t5_tokenizer, clip_tokenizer):
            tokenizer.no_padding()
            tokenizer.no_truncation()

    def encode(
        self,
        prompts: list[str],
        clip_prompts: list[str] | None = None,
        on_notice: Callable[[str], None] | None = None,
        txt_length: int | None = None,
    ) -> Conditioning:
        """Conditioning with txt [B, txt_length, C] and pooled [B, P], float32, of B prompts.

        CLIP encodes `clip_prompts` where given. `txt_length` is the number of T5 tokens: by default, and at
        most, `self.txt_length`. With NO_PADDING it is the prompt's own token count; padding is otherwise
        visible to the transformer. A prompt that is too long is truncated, and a sentence with both token
        counts is passed to `on_notice`, or else to the log. Raises ValueError when the lists differ in
        length, for a negative length, and with NO_PADDING for prompts of different lengths, which do not
        fit in one tensor.
        """
        prompts = [_as_unicode(prompt) for prompt in prompts]
        clip_prompts = prompts if clip_prompts is None else [_as_unicode(prompt) for prompt in clip_prompts]
        if len(clip_prompts) != len(prompts):
            raise ValueError(
                f"T5 and CLIP need the same number of prompts, got {len(prompts)} and {len(clip_prompts)}"
            )
        txt_length = self.length_of(prompts, self.txt_length if txt_length is None else txt_length)
        for prompt, clip_prompt in zip(prompts, clip_prompts, strict=True):
            for count in self.token_counts(prompt, clip_prompt, txt_length):
                if count.needed > count.limit:
                    notice = (
                        f"the prompt is too long for {count.encoder}: {count.needed} tokens, "
                        f"of which it reads the first {count.limit}"
                    )
                    (on_notice or log.warning)(notice)
        with torch.no_grad():
            return Conditioning(
                self.encode_t5(self.t5_ids(prompts, txt_length)),
                self.encode_clip(self.clip_ids(clip_prompts)),
            )

    def length_of(self, prompts: list[str], txt_length: int) -> int:
        """Number of T5 tokens for these prompts: `txt_length`, or with NO_PADDING their own token count."""
        if txt_length < 0:
            raise ValueError(f"txt_length must not be negative, got {txt_length}; {T5_LENGTH} is usual")
        if txt_length != NO_PADDING:
            return min(txt_length, self.txt_length)
        lengths = sorted({len(self.t5_tokenizer.encode(prompt).ids) for prompt in prompts})
        if len(lengths) != 1:
            raise ValueError(
                "prompts without padding must have the same token count, got "
                f"{', '.join(map(str, lengths))}; encode one prompt at a time"
            )
        return min(lengths[0], self.txt_length)

    def token_counts(
        self, prompt: str, clip_prompt: str | None = None, txt_length: int | None = None
    ) -> tuple[TokenCount, TokenCount]:
        """Token counts for T5 and for CLIP."""
        clip_prompt = prompt if clip_prompt is None else clip_prompt
        limit = self.txt_length if txt_length is None else txt_length
        return (
            TokenCount("T5", len(self.t5_tokenizer.encode(prompt).ids), limit),
            TokenCount("CLIP", len(self.clip_tokenizer.encode(clip_prompt).ids), self.clip_length),
        )

    def t5_ids(self, prompts: list[str], txt_length: int | None = None) -> Tensor:
        """Token ids [B, txt_length], truncated before the end mark, padded with T5's 0."""
        return _pad(
            [self.t5_tokenizer.encode(p).ids for p in prompts],
            self.txt_length if txt_length is None else txt_length,
            self.t5.config.pad_token_id or 0,
        )

    def clip_ids(self, prompts: list[str]) -> Tensor:
        """Token ids [B, CLIP's length], truncated before the end mark, padded with the end mark."""
        return _pad([self.clip_tokenizer.encode(p).ids for p in prompts], self.clip_length, self.clip_end)

    def encode_t5(self, ids: Tensor) -> Tensor:
        """T5's last hidden state [B, L, C], float32; padding is not masked, as FLUX was trained."""
        return self.t5(input_ids=ids.to(self.t5.device)).last_hidden_state.float()

    def encode_clip(self, ids: Tensor) -> Tensor:
        """CLIP's hidden state at the first end mark [B, P], float32."""
        return self.clip(input_ids=ids.to(self.clip.device)).pooler_output.float()


def _as_unicode(text: str) -> str:
    """The text with U+FFFD for half an emoji (a lone surrogate), which a tokenizer does not accept."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pad(rows: list[list[int]], length: int, pad_id: int) -> Tensor:
    """Rows truncated to `length` before their last id, or padded to it."""
    truncated = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [pad_id] * (length - len(row)) for row in truncated], dtype=torch.long)


def t5_from_shapes(state_dict: Mapping[str, Shaped]) -> T5EncoderModel:
    """T5 v1.1 encoder without weights (on the meta device), sized by the shapes of a state dict.

    Raises ValueError when the state dict is not that of a gated T5 encoder.
    """
    from transformers import T5Config, T5EncoderModel  # here, because this import takes seconds

    attention, mlp = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    if f"{mlp}.wi.weight" in state_dict:
        raise ValueError("it is a T5 v1.0 encoder, FLUX.1 reads T5 v1.1's gated MLP; choose t5xxl")
    needed = ("shared.weight", f"{mlp}.wi_0.weight", f"{attention}.relative_attention_bias.weight")
    missing = next((name for name in needed if name not in state_dict), None)
    if missing is not None:
        raise ValueError(f"a T5 v1.1 encoder has {missing}, which is missing; choose t5xxl")
    shared = state_dict["shared.weight"].shape
    bias = state_dict[f"{attention}.relative_attention_bias.weight"].shape
    if len(bias) != 2 or bias[0] != T5_BUCKETS:
        raise ValueError(
            f"T5's relative_attention_bias has {T5_BUCKETS} rows and a column for each head, "
            f"got shape {[*bias]}; choose an unmodified t5xxl"
        )
    heads = bias[1]
    config = T5Config(
        vocab_size=shared[0],
        d_model=shared[1],
        num_layers=count_blocks(state_dict, "encoder.block."),
        num_heads=heads,
        d_kv=state_dict[f"{attention}.q.weight"].shape[0] // heads,
        d_ff=state_dict[f"{mlp}.wi_0.weight"].shape[0],
        relative_attention_num_buckets=bias[0],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        return T5EncoderModel(config)


def clip_from_shapes(state_dict: Mapping[str, Shaped], eos_token_id: int | None = None) -> CLIPTextModel:
    """CLIP text model without weights (on the meta device), sized by the shapes of a state dict.

    Names are those of `transformers`' text model, without its prefix `text_model.`. A head has 64 dimensions,
    as in every CLIP. The end mark is the last token of the vocabulary, as in OpenAI's, unless `eos_token_id`
    is given. Raises ValueError when the state dict is not that of a CLIP text model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # here, because this import takes seconds

    embedding, mlp = "embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"
    if any(name not in state_dict for name in (embedding, mlp, "embeddings.position_embedding.weight")):
        raise ValueError("a CLIP text encoder has embeddings and layers, not all are there; choose clip_l")
    vocabulary, width = state_dict[embedding].shape[0], state_dict[embedding].shape[1]
    length = state_dict["embeddings.position_embedding.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=count_blocks(state_dict, "encoder.layers."),
        num_attention_heads=width // 64,
        intermediate_size=state_dict[mlp].shape[0],
        max_position_embeddings=length,
        hidden_act="quick_gelu",
        bos_token_id=None,
        eos_token_id=vocabulary - 1 if eos_token_id is None else eos_token_id,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # No file contains this buffer.
    inner = getattr(model, "text_model", model)  # transformers 4 wraps it, 5 does not
    inner.embeddings.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    return model
