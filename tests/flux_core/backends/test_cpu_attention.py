"""Attention by oneDNN: softmax(q k^T / sqrt(D)) v as torch's, where it is chosen and where not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import relative_error
from rectiflux.flux_core.backends import cpu_attention as module
from rectiflux.flux_core.backends.choose import table
from rectiflux.flux_core.backends.cpu_attention import attend, serves
from rectiflux.flux_core.backends.onednn import can_pack
from rectiflux.flux_core.model.autoencoder import AttnBlock
from torch import Tensor

CPU = torch.device("cpu")
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
able = [
    pytest.param(dtype, marks=pytest.mark.skipif(not can_pack(CPU, dtype), reason="oneDNN has none here"))
    for dtype in ERRORS
]


def drawn(length: int, keys: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q [2, 3, length, dim], k and v [2, 3, keys, dim], laid out as a CPU's blocks have them."""
    generator = torch.Generator().manual_seed(0)
    lengths = (length, keys, keys)
    return [torch.randn(2, n, 3, dim, generator=generator).to(dtype).transpose(1, 2) for n in lengths]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joint = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return joint.transpose(1, 2).flatten(2)


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on AMD's processors with AVX-512, and for few tokens, too."""
    monkeypatch.setattr(module, "is_quicker", lambda dtype: dtype in ERRORS)
    monkeypatch.setattr(module, "FEWEST", 8)
    table.cache_clear()
    yield
    table.cache_clear()


@pytest.mark.parametrize("dtype", able)
@pytest.mark.parametrize(("length", "keys"), [(50, 50), (1, 7), (33, 20)])
def test_it_is_attention(dtype: torch.dtype, length: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time: 33 are no multiple of them."""
    monkeypatch.setattr(module, "SCORES", 160)
    monkeypatch.setattr(module, "QUERIES", 2)
    q, k, v = drawn(length, keys, dtype=dtype)
    found = attend(q, k, v)
    assert found.dtype == dtype and found.shape == (2, length, 48)
    assert relative_error(found, exact(q, k, v)) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", able)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_scores_and_one_that_outweighs_all(dtype: torch.dtype, scale: float) -> None:
    """Scores of thousands are rounded to 1e-4 in float32, in torch's as in ours."""
    q, k, v = drawn(16, 16, dtype=dtype)
    wanted = exact(scale * q, k, v)
    theirs = F.scaled_dot_product_attention(scale * q, k, v).transpose(1, 2).flatten(2)
    assert (
        relative_error(attend(scale * q, k, v), wanted) < 2 * relative_error(theirs, wanted) + ERRORS[dtype]
    )


@pytest.mark.parametrize("dtype", able)
def test_where_it_is_used(dtype: torch.dtype, slow_mkl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(9, 9, dtype=dtype)
    few = slice(7)
    with torch.no_grad():
        assert serves(q, k, v)
        assert torch.equal(table("torch", "cpu", on_cpu=True).attention(q, k, v, None), attend(q, k, v))
        assert not serves(q[..., few, :], k, v) and not serves(q, k[..., few, :], v[..., few, :])
        assert not serves(q.half(), k.half(), v.half()) and not serves(*(x.to("meta") for x in (q, k, v)))
    with torch.enable_grad():
        assert not serves(q, k, v)
    monkeypatch.setattr(module, "is_quicker", lambda dtype: False)
    with torch.no_grad():
        assert not serves(q, k, v)


@pytest.mark.parametrize("dtype", able)
def test_the_autoencoder_attends_by_it(dtype: torch.dtype, slow_mkl: None) -> None:
    block, x = AttnBlock(32, 8).to(dtype).requires_grad_(False), torch.randn(2, 32, 3, 5).to(dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        found = block(x)
        patch.setattr(module, "is_quicker", lambda dtype: False)
        assert relative_error(found, block(x)) < 2 * ERRORS[dtype]
        patch.setattr(module, "is_quicker", lambda dtype: True)
        patch.setattr(module, "attend", lambda q, k, v: torch.zeros_like(v).flatten(1, 2))
        assert relative_error(block(x), found) > 2 * ERRORS[dtype]


def test_compilers_know_its_shape() -> None:
    torch.library.opcheck(module.operator(), tuple(drawn(9, 5)), test_utils="test_faketensor")


def test_compiled_code_attends_by_it(slow_mkl: None) -> None:
    q, k, v = drawn(12, 12)
    compute = table("torch", "cpu", compiled=True, on_cpu=True).attention
    found = torch.compile(compute, fullgraph=True, backend="aot_eager")(q, k, v, None)
    assert relative_error(found, exact(q, k, v)) < ERRORS[torch.float32]
