"""What to do when memory is full, in the words of this pack's widgets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ADVICE = "lower memory_limit at Load FLUX Model, or choose a smaller picture or batch"


@contextmanager
def advice_when_full() -> Iterator[None]:
    """A block in which a device's memory may be full: the same error then says which widget to turn.

    It stays the error by which ComfyUI knows that it has to unload its models.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = (str(error).splitlines() or ["the memory is full"])[0].rstrip(". ")
        raise torch.OutOfMemoryError(f"{what}; {ADVICE}") from None
