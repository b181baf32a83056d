"""Run by test_fused.py in a process of its own, where Triton interprets: kernels beside their twins.

Triton reads TRITON_INTERPRET as it is imported, and from then on can do nothing else. Prints one JSON object:
{case: largest error, in units of what is allowed} and under "launched" what the whole model launched.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# below, because they import Triton, which must find both lines above done
from flux_core import fp8, fused, layers  # noqa: E402
from flux_core.spec import Conditioning, FluxSpec  # noqa: E402
from flux_core.transformer import FluxTransformer  # noqa: E402

TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-11, 1e-5)}
"""Relative and absolute: rounding once to the dtype is half a step of it. To bfloat16 Triton's interpreter
cuts off, where a GPU rounds (cvt.rn): a whole step."""
SHAPES = [
    # batch, rows of the modulation, L, N, heads, head dim
    ((1, 1, 3, 5, 6, 32), (torch.float32, torch.bfloat16, torch.float16)),
    ((2, 1, 1, 2, 2, 96), (torch.float32,)),
    ((2, 2, 2, 1, 24, 128), (torch.float32, torch.bfloat16)),
]

generator = torch.Generator().manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def error(found: Tensor | None, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error over what is allowed; at most 1 is right."""
    assert found is not None and found.dtype == dtype and found.shape == exact.shape
    relative, absolute = TOLERANCE[dtype]
    exact = exact.double()
    return float(((found.double() - exact).abs() / (relative * exact.abs() + absolute)).max())


def elementwise(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Norm, residual and GELU against their twins in float64, on rows that are cut out of longer ones."""
    batch, rows, _, length, heads, dim = shape
    width = heads * dim
    x, y = (drawn(batch, length + 1, width + 32, dtype=dtype)[:, 1:, :width] for _ in range(2))
    shift, scale, gate = drawn(3, rows, 1, width, dtype=dtype)
    exact_shift, exact_scale, exact_gate = (t.double() for t in (shift, scale, gate))

    def norm(x: Tensor) -> Tensor:
        return torch.addcmul(exact_shift, F.layer_norm(x.double(), (width,), eps=1e-6), exact_scale)

    yield "norm", error(fused.modulated_norm(x, shift, scale), norm(x), dtype)
    sum_ = x.double() + exact_gate * y.double()
    yield "residual", error(fused.gated_residual(x, gate, y), sum_, dtype)
    both = fused.residual_and_norm(x, gate, y, shift, scale)
    assert both is not None
    yield "residual and norm: residual", error(both[0], sum_, dtype)
    yield "residual and norm: norm", error(both[1], norm(both[0]), dtype)
    plain, wide = 3 * 8, drawn(batch, length, 3 * 8 + 40, dtype=dtype)
    gelu = F.gelu(wide[..., plain:].double(), approximate="tanh")
    yield "GELU", error(fused.beside_gelu(x, wide, plain), torch.cat([x.double(), gelu], -1), dtype)


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Rows in fp8 against the twin: how many are further off than its are. One row is zero, one tiny.

    Triton's interpreter rounds ties away from zero, and forgets to carry where a number is rounded up to a
    power of two: the latter are left out. A GPU does neither (cvt.rn).
    """
    batch, _, _, length, heads, dim = shape
    x = drawn(batch * length + 2, heads * dim + 32, dtype=dtype)[:, : heads * dim]
    x[-2], x[-1] = 0, 1e-7 * x[-1]
    found = fused.rows_in_fp8(x, fp8.LARGEST, fp8.SMALLEST)
    assert found is not None and found[0].dtype == fp8.FP8
    exact = fp8.rows_in_fp8(x)
    ours, twins, numbers = found[0].float(), exact[0].float(), x.float() / exact[1]
    carried = (twins.abs().frexp().mantissa == 0.5) & (numbers.abs() < twins.abs())
    assert carried.float().mean() < 0.05
    worse = ((ours - numbers).abs() > (twins - numbers).abs()) & ~carried
    yield "fp8: codes that are worse", 2.0 * int(worse.sum())
    yield "fp8: scales that differ", 2.0 * int((found[1] != exact[1]).sum())


def heads(shape: tuple[int, ...], dtype: torch.dtype, streams: int) -> Iterator[tuple[str, float]]:
    """Queries, keys and values against the twin in float32."""
    batch, _, txt, img, count, dim = shape
    lengths = [txt, img][-streams:]
    first = dim // 8
    ids = torch.rand(sum(lengths), 3, generator=generator) * 9
    rope = layers.rope_table(ids, (first, (dim - first) // 2, (dim - first) // 2), 10_000)
    norms = [layers.QKNorm(dim).requires_grad_(False) for _ in lengths]
    for norm in norms:
        for part in (norm.query_norm, norm.key_norm):
            part.scale.copy_(1 + 0.3 * drawn(dim))
            part.to(dtype)
    whole = [drawn(batch, length, 3 * count * dim + 16, dtype=dtype) for length in lengths]
    qkv = [tensor[..., : 3 * count * dim] for tensor in whole]
    scales = [(norm.query_norm.scale, norm.key_norm.scale) for norm in norms]
    found = fused.queries_keys_values(
        [(tensor, *pair) for tensor, pair in zip(qkv, scales, strict=True)], count, rope
    )
    assert found is not None
    rows = [(tensor.float().contiguous(), norm) for tensor, norm in zip(qkv, norms, strict=True)]
    for name, ours, twin in zip("qkv", found, layers.queries_keys_values(rows, count, rope), strict=True):
        yield f"{name} of {streams}", error(ours, twin, dtype)


def whole_model() -> tuple[float, dict[str, int]]:
    """(relative error of a velocity with all kernels over 1e-5, how often each was launched)."""
    spec = FluxSpec(64, 2, 2, 1, context_in=24, vec_in=20)
    model = FluxTransformer(spec).eval().requires_grad_(False)
    for parameter in model.parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(size * drawn(*parameter.shape))
    tokens, prompt = drawn(2, 4, spec.in_channels), Conditioning(drawn(2, 2, 24), drawn(2, 20))
    prepared = model.prepare(prompt, [0.5], 4, 4)
    plain = model(tokens, prepared, 0.5)
    launched: Counter[str] = Counter()

    def counted(name: str, inner: Any) -> Any:
        def counting(*args: Any) -> Any:
            launched[name] += 1
            return inner(*args)

        return counting

    for name in set(fused.__all__) - {"LARGE", "serves"}:
        setattr(fused, name, counted(name, getattr(fused, name)))
    fused.serves = lambda x: True
    found = model(tokens, prepared, 0.5)
    return float((found - plain).norm() / plain.norm()) / 1e-5, dict(launched)


def main() -> None:
    torch.set_num_threads(1)
    fused.LARGE = 0
    told: dict[str, object] = {}
    for shape, dtypes in SHAPES:
        for dtype in dtypes:
            found = [*elementwise(shape, dtype), *codes(shape, dtype)]
            found += [*heads(shape, dtype, 1), *heads(shape, dtype, 2)]
            name = str(dtype).removeprefix("torch.")
            told.update({f"{kernel}, {name}, {list(shape)}": value for kernel, value in found})
    told["whole model"], told["launched"] = whole_model()
    assert not fused._off, fused._off
    print(json.dumps(told))


if __name__ == "__main__":
    with torch.no_grad():
        main()
