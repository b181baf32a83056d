"""A recording gives what the work gives, to the last bit, from whatever is in its inputs by then."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.forms import Scaled
from rectiflux.flux_core.packing import pack_weights, quantise_to_int8
from rectiflux.flux_core.recorder import OperationRecorder
from rectiflux.flux_core.stored import StoredLinear
from rectiflux.flux_core.transformer import FluxTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[Tensor, Tensor], Tensor]


class Counted(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_again(work: Work, shape: tuple[int, ...] = (2, 6, 8)) -> Callable[[], Tensor]:
    """Record work on two tensors, and see that it is done again as often as one likes."""
    x, y = drawn(0, *shape), drawn(1, *shape)
    with torch.no_grad():
        replay = OperationRecorder().record(lambda: work(x, y))
        for seed in (0, 2, 4):
            x.copy_(drawn(seed, *shape))
            y.copy_(drawn(seed + 1, *shape))
            expected = work(x, y)
            assert torch.equal(replay(), expected) and torch.equal(replay(), expected)
    return replay


def sliced(x: Tensor, y: Tensor) -> Tensor:
    room = torch.empty_like(x)
    for rows in (slice(0, 2), slice(2, None)):
        room[:, rows] = x[:, rows] + 1
    return room * y


def in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    before = z * 2
    z[:, 1:3].mul_(y[:, :2])
    return before + z * 2  # not what z * 2 was before


def attended(x: Tensor, y: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, y, x - y))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def turned(x: Tensor, y: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(y[..., :4], y[..., 4:])
    return torch.view_as_real(pairs).flatten(-2)


def in_parts(x: Tensor, y: Tensor) -> Tensor:
    first, second = torch.cat([x, y], dim=1).chunk(2, dim=-1)
    largest, where = (first * second).max(dim=-1, keepdim=True)
    return torch.where(where == 0, largest, first.to(torch.bfloat16).float())


def written_out(x: Tensor, y: Tensor) -> Tensor:
    joint = x.new_empty(*x.shape[:-1], 16)
    joint[..., :8].copy_(y)
    torch.mul(x, y, out=joint[..., 8:])
    return joint


WORKS: dict[str, Work] = {
    "views": lambda x, y: (x.transpose(1, 2)[:, 1:] @ y[:, :, 2:5]).flatten(1),
    "a norm": lambda x, y: F.layer_norm(x, (8,), y[0, 0], y[1, 1]) + F.layer_norm(y, (8,)),
    "an input as it is": lambda x, y: x.flatten(1),
    "one result twice": lambda x, y: torch.stack([x.exp(), x.exp(), y.exp()]),
    "the second of two": lambda x, y: [x.exp() * y, x.exp() * y][1],
    "slices of a room": sliced,
    "a change in its place": in_place,
    "attention": attended,
    "complex numbers": turned,
    "several results": in_parts,
    "results where they are told": written_out,
}


@pytest.mark.parametrize("name", list(WORKS))
def test_work_is_done_again(name: str) -> None:
    assert_again(WORKS[name])


@pytest.mark.parametrize("seed", range(20))
def test_memory_is_shared_by_what_is_not_needed_at_once(seed: int) -> None:
    """Of long random works, in which results are used soon, late, and changed in place."""

    def work(x: Tensor, y: Tensor) -> Tensor:
        rng, made = random.Random(seed), [x, y]
        for _ in range(60):
            one, other = rng.choice(made[-8:]), rng.choice(made)
            kind = rng.randrange(6)
            if kind == 0 and one is not x and one is not y:
                one.mul_(other.sigmoid())
            elif kind == 1:
                made.append(one.mT.contiguous().mT)
            elif kind == 2:
                made.append(torch.cat([one[..., 3:], other[..., :3]], dim=-1))
            elif kind == 3:
                made.append(F.layer_norm(one, one.shape[-1:]))
            else:
                made.append(torch.tanh(one - other) if kind == 4 else one + 0.5 * other)
        return torch.stack(made[-12:]).sum(0)

    assert_again(work)


def test_nothing_of_python_runs_again_and_the_result_has_one_place() -> None:
    called = []

    def work(x: Tensor, y: Tensor) -> Tensor:
        called.append(1)
        return x * y

    replay = assert_again(work)
    count = len(called)
    assert replay().data_ptr() == replay().data_ptr() and len(called) == count


def test_what_is_the_same_is_computed_once_and_views_are_not_made_again() -> None:
    def work(x: Tensor, y: Tensor) -> Tensor:
        return (x.flatten(1).exp() * y.flatten(1).cos()) + x.flatten(1).exp()

    replay = assert_again(work)
    with Counted() as counted:
        replay()
    assert counted.names == ["exp", "cos", "mul", "add"]


def test_numbers_of_another_type_are_others() -> None:
    """2 and 2.0 are equal to Python, and not to torch."""

    def work(x: Tensor, y: Tensor) -> Tensor:
        whole = (8 * x).long()
        return (whole * 2).double() + (whole * 2.0).bfloat16()

    assert_again(work)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        pytest.param(lambda x, y: x + torch.rand(8), "rand.* gives something else each time", id="random"),
        pytest.param(lambda x, y: x * x.sum().item(), "_local_scalar_dense.* gives", id="a decision"),
        pytest.param(lambda x, y: x.add_(y), "add_.* changes what the work starts from", id="its input"),
        pytest.param(
            lambda x, y: F.scaled_dot_product_attention(x, y, y, dropout_p=0.5),
            "gives something",
            id="dropout",
        ),
    ],
)
def test_what_would_not_be_the_same_is_refused(work: Work, message: str) -> None:
    x, y = drawn(0, 2, 6, 8), drawn(1, 2, 6, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        OperationRecorder().record(lambda: work(x, y))


@pytest.mark.parametrize("recorded_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("replayed_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_one_mode_records_and_another_replays(recorded_in: Any, replayed_in: Any, made_in: Any) -> None:
    """Attention with its heads, which inference mode tells as one operation, and a change in place."""

    def work(x: Tensor, y: Tensor) -> Tensor:
        return in_place(attended(x, y), F.linear(y, x[0, 0].outer(y[0, 0])))

    with made_in():
        x, y = drawn(0, 2, 6, 8), drawn(1, 2, 6, 8)
    with recorded_in():
        replay = OperationRecorder().record(lambda: work(x, y))
    with replayed_in():
        assert torch.equal(replay(), work(x, y))


# Models


def in_bfloat16() -> FluxTransformer:
    return flux_transformer().to(torch.bfloat16)


def packed() -> FluxTransformer:
    model = in_bfloat16()
    pack_weights(model)
    return model


def in_int8() -> FluxTransformer:
    model = flux_transformer()
    quantise_to_int8(model)
    return model


def stored() -> FluxTransformer:
    """With a layer that becomes numbers at each use."""
    model = flux_transformer()
    block = model.single_blocks[0]
    codes = (16 * block.linear1.weight).to(torch.float8_e4m3fn)
    block.linear1 = StoredLinear(Scaled(codes, torch.tensor(1 / 16)), block.linear1.bias, torch.float32)
    return model


@pytest.mark.parametrize("make", [flux_transformer, in_bfloat16, packed, in_int8, stored])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_models_blocks_are_done_again(make: Callable[[], FluxTransformer], batch: int) -> None:
    model = make()
    with torch.no_grad():
        prepared = model.prepare(text(0), [0.7, 0.3], 4, 6)
        tokens = drawn(0, batch, 6, 64).to(model.dtype)
        made = prepared.at(0.7)
        assert made.table is not None
        table = made.table.clone()
        txt = prepared.txt.expand(batch, -1, -1)
        replay = OperationRecorder().record(
            lambda: model.blocks(tokens, txt, made.laid_out(table), prepared.rope)
        )
        for sigma, seed in ((0.7, 0), (0.3, 1)):
            tokens.copy_(drawn(seed, batch, 6, 64))
            later = prepared.at(sigma)
            assert later.table is not None
            table.copy_(later.table)
            assert torch.equal(replay(), model.blocks(tokens, txt, later, prepared.rope))
