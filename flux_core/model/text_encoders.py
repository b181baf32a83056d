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

from .prompts import LITERAL, PromptReader, Reading, Token, fit, reading_notices, syntax_notices
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
        self.t5_reader, self.clip_reader = (
            PromptReader.of("T5", t5_tokenizer),
            PromptReader.of("CLIP", clip_tokenizer),
        )

    def encode(
        self,
        prompts: list[str],
        clip_prompts: list[str] | None = None,
        on_notice: Callable[[str], None] | None = None,
        txt_length: int | None = None,
        weights: str = LITERAL,
    ) -> Conditioning:
        """Conditioning with txt [B, txt_length, C] and pooled [B, P], float32, of B prompts.

        CLIP encodes `clip_prompts` where given. `txt_length` is the number of T5 tokens: by default, and at
        most, `self.txt_length`. With NO_PADDING it is the prompt's own token count; padding is otherwise
        visible to the transformer. With `weights` "comfy" T5's vectors of weighted words are scaled as in
        ComfyUI; CLIP's vector has no weights. Whatever has no effect is passed to `on_notice`, or else to
        the log, in sentences: the end of a prompt that is too long, characters that a tokenizer does not
        know, tags of other programs, weights that are read literally. Raises ValueError when the lists
        differ in length, for a negative length, and with NO_PADDING for prompts of different lengths, which
        do not fit in one tensor.
        """
        clip_prompts = prompts if clip_prompts is None else clip_prompts
        if len(clip_prompts) != len(prompts):
            raise ValueError(
                f"T5 and CLIP need the same number of prompts, got {len(prompts)} and {len(clip_prompts)}"
            )
        readings = [self.t5_reader.read(prompt, weights) for prompt in prompts]
        clip_readings = [self.clip_reader.read(prompt, weights) for prompt in clip_prompts]
        length = self._length([reading.needed for reading in readings], txt_length)
        for texts, pair in zip(
            zip(prompts, clip_prompts, strict=True), zip(readings, clip_readings, strict=True), strict=True
        ):
            notices = syntax_notices(texts, weights) + reading_notices(pair, (length, self.clip_length))
            for notice in notices:
                (on_notice or log.warning)(notice)
        with torch.no_grad():
            return Conditioning(
                self.encode_tokens([reading.rows()[0] for reading in readings], length),
                self.encode_clip(self._clip_ids(clip_readings)),
            )

    def length_of(self, prompts: list[str], txt_length: int) -> int:
        """Number of T5 tokens for these prompts: `txt_length`, or with NO_PADDING their own token count."""
        return self._length([self.t5_reader.read(prompt).needed for prompt in prompts], txt_length)

    def _length(self, needed: list[int], txt_length: int | None) -> int:
        txt_length = self.txt_length if txt_length is None else txt_length
        if txt_length < 0:
            raise ValueError(f"txt_length must not be negative, got {txt_length}; {T5_LENGTH} is usual")
        if txt_length != NO_PADDING:
            return min(txt_length, self.txt_length)
        lengths = sorted(set(needed))
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
            TokenCount("T5", self.t5_reader.read(prompt).needed, limit),
            TokenCount("CLIP", self.clip_reader.read(clip_prompt).needed, self.clip_length),
        )

    @property
    def t5_pad(self) -> int:
        """T5's id of padding."""
        return self.t5.config.pad_token_id or 0

    def t5_ids(self, prompts: list[str], txt_length: int | None = None) -> Tensor:
        """Token ids [B, txt_length], truncated before the end mark, padded with T5's 0."""
        length = self.txt_length if txt_length is None else txt_length
        rows = [_ids(self.t5_reader.read(prompt).rows()[0]) for prompt in prompts]
        return torch.tensor([fit(row, length, self.t5_pad) for row in rows], dtype=torch.long)

    def clip_ids(self, prompts: list[str]) -> Tensor:
        """Token ids [B, CLIP's length], truncated before the end mark, padded with the end mark."""
        return self._clip_ids([self.clip_reader.read(prompt) for prompt in prompts])

    def _clip_ids(self, readings: list[Reading]) -> Tensor:
        rows = [_ids(reading.rows(self.clip_length)[0]) for reading in readings]
        return torch.tensor([fit(row, self.clip_length, self.clip_end) for row in rows], dtype=torch.long)

    def encode_tokens(self, rows: list[list[Token]], length: int, layer: int = -1) -> Tensor:
        """T5's hidden state [B, length, C], float32, of weighted tokens, truncated or padded to `length`.

        A weight scales the difference to the state of an empty prompt, as in ComfyUI (sd1_clip.py,
        ClipTokenWeightEncoder). `layer` as in `encode_t5`.
        """
        fitted = [fit(row, length, (self.t5_pad, 1.0, 0)) for row in rows]
        state = self.encode_t5(torch.tensor([_ids(row) for row in fitted], dtype=torch.long), layer)
        weights = torch.tensor([[token[1] for token in row] for row in fitted], device=state.device)[
            ..., None
        ]
        if not bool((weights != 1.0).any()):
            return state
        marks = [*self.t5_reader.start, *self.t5_reader.end]
        empty = self.encode_t5(torch.tensor([fit(marks, length, self.t5_pad)], dtype=torch.long), layer)
        return torch.where(weights == 1.0, state, (state - empty) * weights + empty)

    def encode_t5(self, ids: Tensor, layer: int = -1) -> Tensor:
        """T5's last hidden state [B, L, C], float32; padding is not masked, as FLUX was trained.

        `layer` -2 is the state before the last layer, normalized as the last one is, and so on.
        """
        ids = ids.to(self.t5.device)
        if layer == -1:
            return self.t5(input_ids=ids).last_hidden_state.float()
        states = self.t5(input_ids=ids, output_hidden_states=True).hidden_states
        return self.t5.encoder.final_layer_norm(states[layer]).float()

    def encode_clip(self, ids: Tensor) -> Tensor:
        """CLIP's hidden state at the first end mark [B, P], float32."""
        return self.clip(input_ids=ids.to(self.clip.device)).pooler_output.float()


def _ids(row: list[Token]) -> list[int]:
    return [token[0] for token in row]


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
