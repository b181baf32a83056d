"""What to do when memory is full, in terms of this pack's widgets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ADVICE = "lower memory_limit at Load FLUX Model, or choose a smaller image or batch"


@contextmanager
def advice_when_full() -> Iterator[None]:
    """A block in which a device may run out of memory: the error then names the widget to change.

    It stays a torch.OutOfMemoryError, at which ComfyUI unloads its models.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).splitlines() or ["the memory is full"])[0].rstrip(". ")
        raise torch.OutOfMemoryError(f"{reason}; {ADVICE}") from None
