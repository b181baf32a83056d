"""Run a transformer whose weights exceed a memory limit: offload its blocks, prefetch each before its turn.

With a limit some blocks stay resident and the others are offloaded. While one block computes, the next
offloaded one is prefetched; afterwards it is evicted. Offloaded blocks are spread evenly among the resident
ones, so that computation hides the transfer. Modulations, which are used once a run, are offloaded first
(plan.py).

Where offloaded weights lie depends on the device that computes: for a CPU they are pages of the mapped
checkpoint file (disk_offload.py), for a CUDA device they are in host memory (host_offload.py).
"""

from .limits import GIB, LIMITS, fits, free_memory, limit_of
from .plan import stream
from .streaming import Offloader, WeightStreamer

__all__ = ["GIB", "LIMITS", "Offloader", "WeightStreamer", "fits", "free_memory", "limit_of", "stream"]
