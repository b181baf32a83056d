"""Prompts to numbers, by FLUX.1's two text encoders: T5 gives a vector per token, CLIP one for the whole.

The encoders are `transformers`' own; here is what FLUX asks of them: T5 padded to a fixed length and read
without an attention mask, CLIP's state at the end of the text, and sizes taken from the shapes in a file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .spec import Conditioning, Shaped

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

log = logging.getLogger(__name__)

T5_LENGTH = 512
"""Tokens that FLUX.1 [dev] pads the T5 text to; [schnell] is used with 256, Fill with 128."""
OWN_LENGTH = 0
"""In place of a length: as many tokens as the prompt has, so that no padding speaks with it."""


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a prompt needs, end marks included, and how many the encoder reads."""

    encoder: str
    needed: int
    limit: int


class TextEncoders:
    """FLUX.1's pair of text encoders with their tokenizers, whose templates add the end marks."""

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
            raise ValueError(f"CLIP's config must name one end mark, got {end}")
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

        CLIP reads `clip_prompts` where given. `txt_length` counts T5's tokens: the encoders' own number
        unless given, and never more; with OWN_LENGTH, a prompt's own, without the padding that the model
        would read too. A prompt that is too long is cut at its end, and a sentence that says so, with the
        numbers of tokens, goes to `on_notice`, or else to the log. Raises ValueError when the lists differ
        in length, for a negative length, and for prompts of different lengths with OWN_LENGTH, which one
        tensor cannot hold.
        """
        prompts = [_whole(prompt) for prompt in prompts]
        clip_prompts = prompts if clip_prompts is None else [_whole(prompt) for prompt in clip_prompts]
        if len(clip_prompts) != len(prompts):
            raise ValueError(
                f"T5 and CLIP need as many prompts as each other, got {len(prompts)} and {len(clip_prompts)}"
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
        """T5's tokens for these prompts: `txt_length`, or for OWN_LENGTH what each of them has."""
        if txt_length < 0:
            raise ValueError(f"a text needs a number of T5 tokens above 0, got {txt_length}")
        if txt_length != OWN_LENGTH:
            return min(txt_length, self.txt_length)
        lengths = sorted({len(self.t5_tokenizer.encode(prompt).ids) for prompt in prompts})
        if len(lengths) != 1:
            raise ValueError(
                f"texts without padding must be of one length, got {', '.join(map(str, lengths))} tokens; "
                "encode one prompt at a time"
            )
        return min(lengths[0], self.txt_length)

    def token_counts(
        self, prompt: str, clip_prompt: str | None = None, txt_length: int | None = None
    ) -> tuple[TokenCount, TokenCount]:
        """Tokens needed and read, of T5 and of CLIP."""
        clip_prompt = prompt if clip_prompt is None else clip_prompt
        limit = self.txt_length if txt_length is None else txt_length
        return (
            TokenCount("T5", len(self.t5_tokenizer.encode(prompt).ids), limit),
            TokenCount("CLIP", len(self.clip_tokenizer.encode(clip_prompt).ids), self.clip_length),
        )

    def t5_ids(self, prompts: list[str], txt_length: int | None = None) -> Tensor:
        """Token ids [B, txt_length], cut so that the end mark stays, padded with T5's 0."""
        return _pad(
            [self.t5_tokenizer.encode(p).ids for p in prompts],
            self.txt_length if txt_length is None else txt_length,
            self.t5.config.pad_token_id or 0,
        )

    def clip_ids(self, prompts: list[str]) -> Tensor:
        """Token ids [B, CLIP's length], cut so that the end mark stays, padded with the end mark."""
        return _pad([self.clip_tokenizer.encode(p).ids for p in prompts], self.clip_length, self.clip_end)

    def encode_t5(self, ids: Tensor) -> Tensor:
        """T5's last hidden state [B, L, C], float32: padding included and unmasked, as FLUX was trained."""
        return self.t5(input_ids=ids.to(self.t5.device)).last_hidden_state.float()

    def encode_clip(self, ids: Tensor) -> Tensor:
        """CLIP's state at the first end mark [B, P], float32."""
        return self.clip(input_ids=ids.to(self.clip.device)).pooler_output.float()


def _whole(text: str) -> str:
    """The text with U+FFFD for half an emoji (a lone surrogate), which a tokenizer does not take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pad(rows: list[list[int]], length: int, filler: int) -> Tensor:
    """Rows cut to `length` with their last id kept, or filled up to it."""
    cut = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [filler] * (length - len(row)) for row in cut], dtype=torch.long)


def t5_of_size(state_dict: Mapping[str, Shaped]) -> T5EncoderModel:
    """T5 v1.1 encoder without numbers (on the meta device), its sizes read off the shapes of a state dict.

    Raises ValueError when the state dict is no gated T5 encoder.
    """
    from transformers import T5Config, T5EncoderModel  # here, because this import takes seconds

    attention, mlp = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    needed = ("shared.weight", f"{mlp}.wi_0.weight", f"{attention}.relative_attention_bias.weight")
    if any(name not in state_dict for name in needed):
        raise ValueError("not a T5 v1.1 encoder: it has no encoder.block.0 with a gated MLP; choose t5xxl")
    shared = state_dict["shared.weight"].shape
    bias = state_dict[f"{attention}.relative_attention_bias.weight"].shape
    heads = bias[1]
    config = T5Config(
        vocab_size=shared[0],
        d_model=shared[1],
        num_layers=_count(state_dict, "encoder.block."),
        num_heads=heads,
        d_kv=state_dict[f"{attention}.q.weight"].shape[0] // heads,
        d_ff=state_dict[f"{mlp}.wi_0.weight"].shape[0],
        relative_attention_num_buckets=bias[0],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        return T5EncoderModel(config)


def clip_of_size(state_dict: Mapping[str, Shaped], eos_token_id: int | None = None) -> CLIPTextModel:
    """CLIP text model without numbers (on the meta device), its sizes read off the shapes of a state dict.

    Names are those of `transformers`' text model, without its prefix `text_model.`. A head has 64 dims, as
    in every CLIP. The end mark is the last word of the vocabulary, as in CLIP's own, unless `eos_token_id`
    says otherwise.
    Raises ValueError when the state dict is no CLIP text model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # here, because this import takes seconds

    embedding, mlp = "embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"
    if any(name not in state_dict for name in (embedding, mlp, "embeddings.position_embedding.weight")):
        raise ValueError("not a CLIP text encoder: it has no embeddings and layers of one; choose clip_l")
    vocabulary, width = state_dict[embedding].shape[0], state_dict[embedding].shape[1]
    length = state_dict["embeddings.position_embedding.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=_count(state_dict, "encoder.layers."),
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
    # No file holds this buffer.
    inner = getattr(model, "text_model", model)  # transformers 4 wraps it, 5 does not
    inner.embeddings.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    return model


def _count(state_dict: Mapping[str, Shaped], prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in state_dict if name.startswith(prefix)})
