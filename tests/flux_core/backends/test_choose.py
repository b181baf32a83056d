"""Every table of operations computes what the reference does."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.flux_core.backends import eager_ops
from rectiflux.flux_core.backends.choose import DIFFERENTIABLE, table
from rectiflux.flux_core.backends.cpu_pack import pack_weights
from rectiflux.flux_core.model.layers import QKNorm, Shared
from rectiflux.flux_core.model.ops import REFERENCE, Ops, rope_table
from rectiflux.flux_core.model.transformer import Evaluation, FluxTransformer, position_ids
from torch import Tensor

CPU = torch.device("cpu")
TABLES = {
    "CPU": table("torch", "cpu"),
    "GPU": table("torch", "cuda"),
    "compiled": table("torch", "cpu", compiled=True),
    "gradients": DIFFERENTIABLE,
}


def velocity(model: FluxTransformer, ops: Ops, batch: int) -> Tensor:
    """The block loop with a table; one prompt for all images, or one each."""
    prompt = text(1, rows=1 if batch == 1 else batch)
    prepared = model.prepare(prompt, [0.6], 6, 8)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(batch, 12, 64, generator=generator).to(model.dtype)
    txt = prepared.txt.expand(batch, -1, -1)
    evaluation = Evaluation(txt, prepared.at(0.6), Shared(prepared.rope, ops))
    return model.run_blocks(model.img_in(tokens), evaluation)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_tables_agree_with_the_reference(
    name: str, packed: bool, dtype: torch.dtype, error: float, batch: int
) -> None:
    exact = velocity(flux_transformer(), REFERENCE, batch)
    model = flux_transformer().to(dtype)
    if packed:
        pack_weights(model)
    assert relative_error(velocity(model, TABLES[name], batch).float(), exact) < error


@torch.no_grad()
def test_rotated_qkv_without_streams_in_common_memory() -> None:
    """Two streams with norms of their own, and one: nothing of the inputs is overwritten."""
    norms, rope = [QKNorm(32), QKNorm(32)], rope_table(position_ids(3, 4, 4), (4, 14, 14), 10_000)
    for norm in norms:
        norm.query_norm.scale.uniform_(0.5, 2)
        norm.key_norm.scale.uniform_(0.5, 2)
    qkv = [torch.randn(2, length, 3 * 64) for length in (3, 4)]
    for streams in (list(zip(qkv, norms, strict=True)), [(torch.cat(qkv, 1), norms[0])]):
        before = [x.clone() for x, _ in streams]
        expected = REFERENCE.rotated_qkv(streams, 2, rope)
        for compute in (eager_ops.CPU.rotated_qkv, eager_ops.GPU.rotated_qkv):
            for found, wanted in zip(compute(streams, 2, rope), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(x, old) for (x, _), old in zip(streams, before, strict=True))


def test_gradients_take_the_reference() -> None:
    model = flux_transformer()
    with torch.enable_grad():
        assert model.ops(CPU) is DIFFERENTIABLE and model.ops(torch.device("meta")) is REFERENCE
    with torch.no_grad():
        assert model.ops(CPU) is model.ops(CPU)


@torch.no_grad()
def test_a_model_that_another_program_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's TorchCompileModel: inductor cannot compile the eager operations of a CPU."""
    model = flux_transformer()
    assert model.ops(CPU).rotated_qkv is eager_ops.CPU.rotated_qkv
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model.ops(CPU).rotated_qkv is REFERENCE.rotated_qkv
    assert model.ops(CPU) is model.ops(CPU, compiled=True)
