"""How strongly tokens of references and image prompts are attended to, as a bias on attention scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import TextSpan


def strength_bias(
    txt_length: int, generated: int, groups: Sequence[tuple[int, float]], spans: Sequence[TextSpan] = ()
) -> Tensor | None:
    """Bias [1, 1, S, S], float32, of all strengths over text, image and groups; None where all are 1.

    `groups` are (number of tokens, strength). A strength s multiplies the softmax weights of its columns:
    log s is added to the scores. A group's is seen by every row but its own; a span's by image rows and by
    the text before it, as ComfyUI's StyleModelApply ("attn_bias") does. Raises ValueError for a strength that
    is negative or not finite.
    """
    image = txt_length + generated
    length = image + sum(count for count, _ in groups)
    bias = torch.zeros(length, length)
    start = image
    for count, strength in groups:
        stop = start + count
        bias[:start, start:stop] += _log(strength)
        bias[stop:, start:stop] += _log(strength)
        start = stop
    for span in spans:
        bias[: span.start, span.start : span.stop] += _log(span.strength)
        bias[txt_length:, span.start : span.stop] += _log(span.strength)
    return bias[None, None] if bias.any() else None


def _log(strength: float) -> float:
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"a strength must be 0 or more, got {strength}; 1 changes nothing")
    return math.log(strength) if strength else -math.inf
