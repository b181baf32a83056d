"""Returns freed memory to the system: what a long use of changing models, sizes and LoRAs would pile up.

glibc keeps freed blocks in its heaps for later allocations. Those of one prompt's sizes do not fit the next
prompt's, and a heap shrinks only from its end, so that with every prompt of another kind some more stays.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def return_to_system() -> None:
    """Have glibc return its unused pages, a few milliseconds; does nothing with other C libraries."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
