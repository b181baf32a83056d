"""A transformer that is larger than the memory: its blocks come in just ahead of use, and go again.

With a limit for the weights some blocks stay near and the others are far. While one computes, the next far
one is on its way; they are spread evenly between those that stay, so that there is computing to hide behind.
Modulations, which are used once a run, are the first to be far (plan.py).

How weights come near depends on where the model computes, and is a `Mover`: the pages of the mapped file on a
CPU (disk_offload.py), two buffers on a CUDA device, filled by a stream of their own (host_offload.py).
"""

from .limits import GIB, LIMITS, fits, free_memory, limit_of
from .plan import stream
from .streaming import Mover, Streaming

__all__ = ["GIB", "LIMITS", "Mover", "Streaming", "fits", "free_memory", "limit_of", "stream"]
