"""Facts about this CPU and its libraries."""

from __future__ import annotations

import torch


def has_avx512() -> bool:
    """Whether torch computes with AVX-512 here, as MKL and oneDNN do then."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def mkl_is_slow() -> bool:
    """Whether MKL, torch's own in float32, does not use AVX-512 although oneDNN does: on AMD's CPUs.

    On one core of an EPYC (Zen 5) from 3072 to 3072 for 256 tokens 104 against 242 GFLOP/s.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # missing in older torch
    return has_avx512() and str(capabilities().get("cpu_name", "")).startswith("AMD")
