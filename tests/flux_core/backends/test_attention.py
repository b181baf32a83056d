"""Attention is softmax(q k^T / sqrt(D) + bias) v, by whichever back end computes it."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.backends import attention as module
from rectiflux.flux_core.backends.attention import (
    ATTENTIONS,
    ORDERS,
    attend,
    attention_backend_name,
    choose,
    chosen,
    use_attention,
)
from rectiflux.flux_core.backends.choose import DIFFERENTIABLE, table
from rectiflux.flux_core.lora import with_lora
from rectiflux.flux_core.model.ops import REFERENCE
from torch import Tensor

BOTH = ("flash3", "sage")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


def drawn(dtype: torch.dtype = FP32, length: int = 7, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [2, 3, length, dim], laid out as a CPU's blocks have them."""
    x = torch.randn(3, 2, length, 3, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = x.transpose(2, 3).unbind()
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """In float64, heads concatenated."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bkld,bkmd->bklm", q, k) / q.shape[-1] ** 0.5 + bias
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    joint = torch.einsum("bklm,bkmd->blkd", weights / weights.sum(-1, keepdim=True), v)
    return joint.flatten(2)


# The choice


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "head_dim", "expected"),
    [
        ((9, 0), BOTH, BF16, 128, "flash3"),
        ((9, 0), BOTH, FP16, 256, "flash3"),
        ((9, 0), BOTH, BF16, 264, "cudnn"),
        ((9, 0), ("sage",), BF16, 128, "cudnn"),
        ((10, 0), BOTH, BF16, 128, "cudnn"),
        ((10, 3), (), FP16, 64, "cudnn"),
        ((9, 0), BOTH, FP32, 128, "torch"),
        ((9, 0), BOTH, BF16, 100, "torch"),
        ((8, 9), BOTH, BF16, 128, "torch"),
        ((12, 0), BOTH, BF16, 128, "torch"),
        ((7, 5), (), FP16, 128, "torch"),
        (None, BOTH, BF16, 128, "torch"),
    ],
)
def test_auto(
    capability: Any, packages: tuple[str, ...], dtype: torch.dtype, head_dim: int, expected: str
) -> None:
    """SageAttention is lossy, and so never among what is chosen by itself."""
    assert choose("auto", capability, packages, dtype, head_dim) == expected


@pytest.mark.parametrize("asked", [name for name in ATTENTIONS if name != "auto"])
def test_what_is_asked_for_by_name_is_used(asked: str) -> None:
    assert choose(asked, (9, 0), BOTH, BF16, 128) == asked
    assert choose("torch", None, (), torch.float64, 3) == "torch"


@pytest.mark.parametrize(
    ("asked", "capability", "packages", "dtype", "head_dim", "message"),
    [
        ("sage3", (9, 0), BOTH, BF16, 128, "one of auto, torch, cudnn, .*, flash3, sage, got 'sage3'"),
        ("sage", (9, 0), ("flash3",), BF16, 128, "needs the package sageattention, which cannot be imported"),
        ("flash3", (9, 0), ("sage",), BF16, 128, "needs the package flash_attn_interface, which cannot be"),
        ("flash3", (8, 9), BOTH, BF16, 128, "needs an NVIDIA GPU of capability 9.0, .* on capability 8.9"),
        ("sage", (7, 5), BOTH, FP16, 128, "needs an NVIDIA GPU of capability 8.0 or more, fp16 or bf16"),
        ("sage", (9, 0), BOTH, BF16, 136, "heads of at most 128 in multiples of 8, got .* and heads of 136"),
        ("flash3", (9, 0), BOTH, BF16, 264, "heads of at most 256 in multiples of 8"),
        ("cudnn", (9, 0), (), FP32, 128, "cudnn needs an NVIDIA GPU, fp16 or bf16, .*, got torch.float32"),
        ("flash", None, (), BF16, 128, "heads in multiples of 8, got .* on another device; choose auto"),
        ("efficient", (9, 0), (), BF16, 100, "got torch.bfloat16 and heads of 100 on capability 9.0; choose"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_why(
    asked: str, capability: Any, packages: tuple[str, ...], dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(asked, capability, packages, dtype, head_dim)


def test_packages_are_looked_for_only_where_they_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(module, "importable", lambda name: bool(asked.append(name)) or True)
    for capability in ((9, 0), (8, 9)):
        monkeypatch.setattr(module, "capability_of", lambda device, c=capability: c)
        for name in ("auto", "cudnn"):
            chosen(name, torch.device("cuda"), BF16, 128)
    assert asked == ["flash3"]
    assert chosen("auto", CPU, BF16, 128) == chosen("auto", torch.device("mps"), FP16, 64) == "torch"
    assert chosen("sage", torch.device("cuda"), BF16, 128) == "sage" and asked == ["flash3", "sage"]


def test_the_environment_replaces_auto_where_it_can_run(
    hopper: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice by name stays; in fp32, with too large heads, elsewhere and without the package: auto."""
    cuda = torch.device("cuda")
    monkeypatch.setenv("RECTIFLUX_ATTENTION", "sage")
    assert chosen("auto", cuda, BF16, 128) == "sage" and chosen("cudnn", cuda, BF16, 128) == "cudnn"
    assert chosen("auto", cuda, FP32, 128) == "torch" and chosen("auto", cuda, BF16, 256) == "flash3"
    assert chosen("auto", CPU, BF16, 128) == "torch"
    monkeypatch.setenv("RECTIFLUX_ATTENTION", "torch")
    assert chosen("auto", cuda, BF16, 128) == chosen("auto", cuda, FP32, 100) == "torch"
    monkeypatch.setenv("RECTIFLUX_ATTENTION", "sage")
    monkeypatch.setattr(module, "importable", lambda name: name == "flash3")
    assert chosen("auto", cuda, BF16, 128) == "flash3"
    monkeypatch.setenv("RECTIFLUX_ATTENTION", "sega")
    with pytest.raises(ValueError, match="sega"):
        chosen("auto", cuda, BF16, 128)


def test_only_nvidia_cards_have_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert module.capability_of(CPU) is None
    assert module.capability_of(torch.device("cuda")) == (9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert module.capability_of(torch.device("cuda")) is None


# The product


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-14), (FP32, 1e-6), (BF16, 2**-7)])
@pytest.mark.parametrize("backend", ["torch", *ORDERS])
def test_attention_is_the_formula(backend: str, dtype: torch.dtype, exact: float) -> None:
    """On the CPU torch skips what it cannot compute in the order that it is given."""
    qkv = drawn(dtype)
    result = attend(*qkv, backend=backend)
    assert result.shape == (2, 7, 24) and result.dtype == dtype
    torch.testing.assert_close(result.double(), by_hand(*qkv), rtol=exact, atol=exact)


@pytest.mark.parametrize("backend", ["torch", "cudnn"])
@pytest.mark.parametrize("compute", [attend, REFERENCE.attention, DIFFERENTIABLE.attention])
def test_a_bias_is_added_to_the_scores(compute: Any, backend: str) -> None:
    q, k, v = drawn(torch.float64)
    bias = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(1)).double()
    options = {"backend": backend} if compute is attend else {}
    expected = by_hand(q, k, v, bias)
    torch.testing.assert_close(compute(q, k, v, bias, **options), expected, rtol=1e-12, atol=1e-12)
    keep = bias > 0
    keep[..., 0] = True
    masked = by_hand(q, k, v, torch.zeros_like(bias).masked_fill(~keep, -torch.inf))
    torch.testing.assert_close(compute(q, k, v, keep, **options), masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, FP32])
@pytest.mark.parametrize("compute", [REFERENCE.attention, DIFFERENTIABLE.attention])
def test_gradients(dtype: torch.dtype, compute: Any) -> None:
    ours = [x.clone().requires_grad_() for x in drawn(dtype)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    compute(*ours, None).square().sum().backward()
    by_hand(*theirs).square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_the_order_is_given_to_torch_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((torch._C._get_sdp_priority_order()[:4], torch.backends.cuda.cudnn_sdp_enabled()))
        return inner(q, k, v, **options)

    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attend(*drawn(), backend="cudnn")
    assert seen == [([int(backend) for backend in ORDERS["cudnn"]], True)]
    assert torch._C._get_sdp_priority_order() == before


class Fake(ModuleType):
    """A package of a backend: takes exactly what the real one's signature has, and keeps what it got."""

    def __init__(self, name: str, result: Any = None) -> None:
        super().__init__(name)
        self.got: list[Any] = []
        self.result = result or (lambda out: out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """All [B, L, K, D], as both real ones are called here."""
        weights = torch.softmax(torch.einsum("blkd,bmkd->bklm", q, k).float() * scale, dim=-1)
        return torch.einsum("bklm,bmkd->blkd", weights, v.float()).to(q.dtype)

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> Any:
        """Dao-AILab/flash-attention, hopper/flash_attn_interface.py: (batch, seqlen, nheads, headdim)."""
        self.got.append((q.shape, q.stride(-1), softmax_scale, causal))
        return self.result(self._attend(q, k, v, softmax_scale or q.shape[-1] ** -0.5))

    def sageattn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """thu-ml/SageAttention, sageattention/core.py; NHD is [batch, len, heads, dim]."""
        self.got.append((q.shape, q.stride(-1), sm_scale, is_causal))
        assert not return_lse
        if tensor_layout == "HND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = self._attend(q, k, v, sm_scale or q.shape[-1] ** -0.5)
        return self.result(out.transpose(1, 2) if tensor_layout == "HND" else out)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """As on an H100 with both packages, but that the products are the CPU's."""
    fakes = {name: Fake(package) for name, (package, _) in module.PACKAGES.items()}
    for fake in fakes.values():
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(module, "capability_of", lambda device: (9, 0))
    module._function.cache_clear()
    yield fakes
    module._function.cache_clear()


@pytest.mark.parametrize("backend", BOTH)
def test_packages_get_tokens_before_heads(hopper: dict[str, Fake], backend: str) -> None:
    """Lengths and heads differ, so that swapping them would show."""
    fake, qkv = hopper[backend], drawn(BF16)
    result = table(backend, "cuda").attention(*qkv, None)
    torch.testing.assert_close(result.double(), by_hand(*qkv), rtol=2**-7, atol=2**-7)
    assert fake.got == [(torch.Size([2, 7, 3, 8]), 1, 8**-0.5, False)]


def test_what_packages_return_is_understood(hopper: dict[str, Fake]) -> None:
    """FlashAttention-3's older builds give (out, lse); SageAttention cuts its result out of a padded one."""
    qkv = drawn(BF16)
    hopper["flash3"].result = lambda out: (out, out.sum())
    hopper["sage"].result = lambda out: torch.nn.functional.pad(out, (0, 56))[..., :8]
    expected = attend(*qkv).double()
    for backend in BOTH:
        found = table(backend, "cuda").attention(*qkv, None).double()
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_packages_have_no_part_in_gradients_or_biases(hopper: dict[str, Fake]) -> None:
    model = flux_transformer().bfloat16()
    use_attention(model, "sage")
    with torch.enable_grad():
        model.ops(CPU).attention(*drawn(BF16), None)
    with torch.no_grad():
        model.ops(CPU).attention(*drawn(BF16), torch.zeros(1, 1, 7, 7, dtype=BF16))
    assert not hopper["sage"].got


@pytest.mark.parametrize("backend", ["torch", "cudnn", "flash3", "sage"])
def test_compilers_can_trace_it(hopper: dict[str, Fake], backend: str) -> None:
    """In one graph for every length."""
    torch._dynamo.reset()
    attention = table(backend, "cpu", compiled=True).attention
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 9):
            qkv = drawn(BF16, length)
            expected = table(backend, "cpu").attention(*qkv, None)
            torch.testing.assert_close(compiled(*qkv, None), expected, rtol=2**-7, atol=2**-7)


def test_missing_and_broken_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PACKAGES", {"flash3": ("a_broken_build", "f"), "sage": ("not_there", "f")})
    (tmp_path / "a_broken_build.py").write_text("raise RuntimeError('undefined symbol')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module._function.cache_clear()
    assert not module.importable("sage") and not caplog.records
    assert not module.importable("flash3") and not module.importable("flash3")
    assert [record.getMessage() for record in caplog.records] == [
        "a_broken_build is installed but cannot be imported: undefined symbol"
    ]
    module._function.cache_clear()


# A model's setting


@torch.no_grad()
def test_a_models_setting_is_its_own(hopper: dict[str, Fake]) -> None:
    model = flux_transformer().bfloat16()
    other = with_lora(model, [])[0]
    use_attention(other, "sage")
    assert attention_backend_name(model) == "torch"
    assert attention_backend_name(model, torch.device("cuda")) == "FlashAttention-3"
    assert attention_backend_name(other) == "SageAttention, queries and keys in int8"
    tokens, prepared = torch.randn(1, 12, 64), model.prepare(text(3), [0.5], 6, 8)
    plain = model(tokens, prepared, 0.5)
    assert not hopper["sage"].got
    torch.testing.assert_close(other(tokens, prepared, 0.5), plain, rtol=0.05, atol=0.05)
    assert len(hopper["sage"].got) == 2 + 3
    use_attention(other, "auto")
    assert torch.equal(other(tokens, prepared, 0.5), plain)
    assert attention_backend_name(copy.deepcopy(other)) == "torch"


def test_a_model_that_cannot_stays_as_it_was() -> None:
    model = flux_transformer()
    with pytest.raises(
        ValueError, match="sageattention, which cannot be imported; install it, or choose auto"
    ):
        use_attention(model, "sage")
    with pytest.raises(ValueError, match="got torch.float32 and heads of 32 on another device"):
        use_attention(model, "cudnn")
    assert attention_backend_name(model) == "torch"
