"""Each fused kernel beside its plain twin, for interpreted.py, where Triton interprets, and for tests/gpu."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rectiflux.benchmarks import switches
from rectiflux.flux_core import fp8, fused, layers
from rectiflux.flux_core.spec import Conditioning, FluxSpec
from rectiflux.flux_core.transformer import FluxTransformer
from torch import Tensor

TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-11, 1e-5)}
"""Relative and absolute: rounding once to the dtype is half a step of it. To bfloat16 Triton's interpreter
cuts off, where a GPU rounds (cvt.rn): a whole step."""
KERNELS = set(fused.__all__) - {"LARGE", "serves"}
SHAPES = [
    # batch, rows of the modulation, L, N, heads, head dim
    ((1, 1, 3, 5, 6, 32), (torch.float32, torch.bfloat16, torch.float16)),
    ((2, 1, 1, 2, 2, 96), (torch.float32,)),
    ((2, 2, 2, 1, 24, 128), (torch.float32, torch.bfloat16)),
]

generator = torch.Generator().manual_seed(0)
place = torch.device("cpu")
"""Where the kernels run."""


def all_cases(
    shape: tuple[int, ...], dtype: torch.dtype, with_fp8: bool = True
) -> Iterator[tuple[str, float]]:
    """(kernel's name, error in units of what is allowed) for every kernel; cards before 8.9 have no fp8."""
    yield from elementwise(shape, dtype)
    if with_fp8:
        yield from codes(shape, dtype)
    yield from heads(shape, dtype, 1)
    yield from heads(shape, dtype, 2)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(place, dtype)


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
    """Rows in fp8: scales, and how many codes are not the nearest to their number. One row is 0, one tiny.

    Triton's interpreter rounds ties away from zero, and forgets to carry where a number is rounded up to a
    power of two: the latter are left out there. A GPU does neither (cvt.rn).
    """
    batch, _, _, length, heads, dim = shape
    x = drawn(batch * length + 2, heads * dim + 32, dtype=dtype)[:, : heads * dim]
    x[-2], x[-1] = 0, 1e-7 * x[-1]
    found = fused.rows_in_fp8(x, fp8.LARGEST, fp8.SMALLEST)
    assert found is not None and found[0].dtype == fp8.FP8
    largest = x.double().abs().amax(1, keepdim=True).clamp_min(fp8.SMALLEST)
    yield "fp8: scales", error(found[1], largest / fp8.LARGEST, torch.float32)
    numbers = (x.float() / found[1]).cpu()
    ours, nearest = found[0].float().cpu(), numbers.to(fp8.FP8).float()
    carried = (nearest.abs().frexp().mantissa == 0.5) & (numbers.abs() < nearest.abs())
    assert carried.float().mean() < 0.05
    worse = (ours - numbers).abs() > (nearest - numbers).abs()
    yield "fp8: codes", 2.0 * int((worse & ~carried if place.type == "cpu" else worse).sum())


def heads(shape: tuple[int, ...], dtype: torch.dtype, streams: int) -> Iterator[tuple[str, float]]:
    """Queries, keys and values against the twin in float32."""
    batch, _, txt, img, count, dim = shape
    lengths = [txt, img][-streams:]
    first = dim // 8
    ids = torch.rand(sum(lengths), 3, generator=generator).to(place) * 9
    rope = layers.rope_table(ids, (first, (dim - first) // 2, (dim - first) // 2), 10_000)
    norms = [layers.QKNorm(dim).to(place).requires_grad_(False) for _ in lengths]
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
    rows = [(tensor.float().contiguous(), norm.float()) for tensor, norm in zip(qkv, norms, strict=True)]
    with switches.kernels(False):
        twins = layers.queries_keys_values(rows, count, rope)
    for name, ours, twin in zip("qkv", found, twins, strict=True):
        yield f"{name} of {streams}", error(ours, twin, dtype)


def whole_model() -> tuple[float, dict[str, int]]:
    """(relative error of a velocity with all kernels over 1e-5, how often each was launched)."""
    spec = FluxSpec(64, 2, 2, 1, context_in=24, vec_in=20)
    model = FluxTransformer(spec).to(place).eval().requires_grad_(False)
    for parameter in model.parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(size * drawn(*parameter.shape))
    tokens, prompt = drawn(2, 4, spec.in_channels), Conditioning(drawn(2, 2, 24), drawn(2, 20))
    prepared = model.prepare(prompt, [0.5], 4, 4)
    with switches.kernels(False):
        plain = model(tokens, prepared, 0.5)
    launched: Counter[str] = Counter()

    def counted(name: str, inner: Any) -> Any:
        def counting(*args: Any) -> Any:
            launched[name] += 1
            return inner(*args)

        return counting

    inner = {name: getattr(fused, name) for name in KERNELS}
    for name, kernel in inner.items():
        setattr(fused, name, counted(name, kernel))
    found = model(tokens, prepared, 0.5)
    for name, kernel in inner.items():
        setattr(fused, name, kernel)
    return float((found - plain).norm() / plain.norm()) / 1e-5, dict(launched)
