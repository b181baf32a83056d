"""How many inputs a fuzzer tries and which, as the environment says.

RECTIFLUX_FUZZ=10000 tries that many inputs in each fuzzer instead of a few hundred; RECTIFLUX_FUZZ_SEED=7
generates others. The same seed generates the same inputs again.
"""

from __future__ import annotations

import os


def fuzz_inputs(default: int) -> int:
    """The number of inputs to try: RECTIFLUX_FUZZ, else `default`."""
    return int(os.environ.get("RECTIFLUX_FUZZ", default))


def fuzz_seed() -> int:
    """The seed that inputs are generated from: RECTIFLUX_FUZZ_SEED, else 1."""
    return int(os.environ.get("RECTIFLUX_FUZZ_SEED", "1"))
