"""The transformer as ComfyUI calls it, without ComfyUI: only its wrapper mechanism is stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rectiflux.flux_core.backends import attention
from rectiflux.flux_core.model.layers import Shared
from rectiflux.flux_core.model.spec import Conditioning, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import VelocityRequest, guided_velocity
from rectiflux.flux_core.tools.kontext import with_references
from rectiflux.nodes.host_comfy_network import RUNNER, ComfyNetwork

from .tiny import random_weights

SPEC = FluxSpec(64, 2, 2, 2, context_in=12, vec_in=10, guidance_embed=True)
SIGMAS = [1.0, 0.7, 0.4, 0.0]
PATCHER = SimpleNamespace(current_hooks=None)


class Executor:
    """comfy.patcher_extension.WrapperExecutor with nothing to wrap."""

    @classmethod
    def new_class_executor(cls, original: Any, obj: Any, wrappers: list[Any]) -> SimpleNamespace:
        return SimpleNamespace(execute=original)


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    comfy, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    extension.WrapperExecutor = Executor
    extension.WrappersMP = SimpleNamespace(DIFFUSION_MODEL="diffusion_model")
    extension.get_all_wrappers = lambda kind, options: []
    comfy.patcher_extension = extension
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


@pytest.fixture
def network() -> FluxTransformer:
    model = FluxTransformer(SPEC)
    model.load_state_dict(random_weights(model, 5))
    return model.requires_grad_(False).eval()


@pytest.fixture
def asked() -> dict[str, torch.Tensor]:
    """What ComfyUI hands over: two prompts in one batch, each with its own guidance."""
    generator = torch.Generator().manual_seed(9)
    return {
        "x": torch.randn(2, 16, 4, 6, generator=generator),
        "context": torch.randn(2, 5, 12, generator=generator),
        "y": torch.randn(2, 10, generator=generator),
        "guidance": torch.tensor([3.5, 2.0]),
    }


def expected(network: FluxTransformer, asked: dict[str, torch.Tensor], sigma: float) -> torch.Tensor:
    """flux_core's own velocity, one prompt after the other."""
    rows = []
    for i in range(2):
        text = Conditioning(asked["context"][i : i + 1], asked["y"][i : i + 1], float(asked["guidance"][i]))
        velocity = guided_velocity(network, VelocityRequest(text, [sigma], 4, 6, 1))
        rows.append(velocity(asked["x"][i : i + 1], sigma))
    return torch.cat(rows)


def step(module: ComfyNetwork, asked: dict[str, torch.Tensor], sigma: float, **kwargs: Any) -> torch.Tensor:
    copies = {name: tensor.clone() for name, tensor in asked.items()}
    options = {"sample_sigmas": torch.tensor(SIGMAS), **kwargs.pop("options", {})}
    return module(copies.pop("x"), torch.full((2,), sigma), transformer_options=options, **copies, **kwargs)


@pytest.mark.parametrize("in_a_run", [True, False])
@pytest.mark.parametrize("sigma", [1.0, 0.4, 0.55])
def test_velocity_is_the_librarys(
    network: FluxTransformer, asked: dict[str, torch.Tensor], sigma: float, in_a_run: bool
) -> None:
    module = ComfyNetwork(network)
    if in_a_run:
        module.begin(PATCHER)
    wanted = expected(network, asked, sigma)
    for _ in range(2):
        torch.testing.assert_close(step(module, asked, sigma), wanted, atol=1e-5, rtol=1e-5)


def test_strengths_of_references_are_the_librarys(
    network: FluxTransformer, asked: dict[str, torch.Tensor]
) -> None:
    """One of two references; with a strength of 1 the velocity is that without strengths."""
    module, references = ComfyNetwork(network), [torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 6)]

    def velocity(*strengths: float) -> torch.Tensor:
        rows = []
        for i in range(2):
            row = slice(i, i + 1)
            text = Conditioning(asked["context"][row], asked["y"][row], float(asked["guidance"][i]))
            text = with_references(text, references, 4, 6, strengths=strengths)
            rows.append(guided_velocity(network, VelocityRequest(text, [0.7], 4, 6, 1))(asked["x"][row], 0.7))
        return torch.cat(rows)

    for strengths in ((1.0, 1.0), (0.25, 3.0), (0.0, 1.0), (0.25,)):  # one without a strength has 1
        found = step(module, asked, 0.7, ref_latents=references, ref_latents_strengths=strengths)
        torch.testing.assert_close(found, velocity(*strengths), atol=1e-5, rtol=1e-5)
    assert (velocity(0.25, 3.0) - velocity(1.0, 1.0)).abs().max() > 0.01
    plain = step(module, asked, 0.7, ref_latents=references)
    torch.testing.assert_close(plain, velocity(1.0, 1.0), atol=1e-5, rtol=1e-5)


def test_every_row_may_have_its_own_sigma(network: FluxTransformer, asked: dict[str, torch.Tensor]) -> None:
    module = ComfyNetwork(network)
    module.begin(PATCHER)
    copies = {name: tensor.clone() for name, tensor in asked.items()}
    both = module(copies.pop("x"), torch.tensor([0.9, 0.2]), **copies)
    torch.testing.assert_close(both[:1], expected(network, asked, 0.9)[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], expected(network, asked, 0.2)[1:], atol=1e-5, rtol=1e-5)


def count(monkeypatch: pytest.MonkeyPatch, network: FluxTransformer, name: str) -> list[Any]:
    calls: list[Any] = []
    real = getattr(network, name)
    monkeypatch.setattr(network, name, lambda *args: calls.append(args) or real(*args))
    return calls


@torch.inference_mode()
def test_what_does_not_depend_on_the_image_is_computed_once_per_run(
    monkeypatch: pytest.MonkeyPatch, network: FluxTransformer, asked: dict[str, torch.Tensor]
) -> None:
    """One batch of modulations for the schedule's sigmas above 0; a solver's own sigma adds one."""
    module = ComfyNetwork(network)
    modulated, projected = (
        count(monkeypatch, network, "modulate"),
        count(monkeypatch, network, "project_text"),
    )
    module.begin(PATCHER)
    for sigma in SIGMAS[:-1] * 2:
        step(module, asked, sigma)
    assert [len(vec) for (vec,) in modulated] == [3 * 2] and len(projected) == 1
    step(module, asked, 0.55)
    assert [len(vec) for (vec,) in modulated] == [6, 2] and len(projected) == 1
    for sigma in (0.55, 0.56, 0.56, *SIGMAS[:-1]):
        step(module, asked, sigma)
    assert [len(vec) for (vec,) in modulated] == [6, 2, 2]
    assert sorted(module._prompts[0].modulations) == pytest.approx([0.4, 0.56, 0.7, 1.0])
    asked["context"] = asked["context"] + 1
    step(module, asked, 1.0)
    assert len(projected) == 2
    module.end()
    step(module, asked, 1.0)
    assert len(projected) == 3


def test_scheduled_hooks_switch_the_memory_off(
    monkeypatch: pytest.MonkeyPatch, network: FluxTransformer, asked: dict[str, torch.Tensor]
) -> None:
    """A LoRA that ComfyUI switches on during the run changes what was computed before it."""
    module, patcher = ComfyNetwork(network), SimpleNamespace(current_hooks=None)
    module.begin(patcher)
    results = []
    for hooks, factor in ((None, 1.0), (object(), 2.0), (None, 0.5), (object(), 3.0)):
        patcher.current_hooks = hooks
        network.double_blocks[0].img_mod.lin.weight.mul_(factor)
        results.append(step(module, asked, 1.0))
        torch.testing.assert_close(results[-1], expected(network, asked, 1.0), atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0], results[2]) and not torch.allclose(results[0], results[1])


def test_parameters_have_bfls_names_and_are_the_networks_own(network: FluxTransformer) -> None:
    module = ComfyNetwork(network)
    assert set(module.state_dict()) == set(network.state_dict())
    assert {id(p) for p in module.parameters()} == {id(p) for p in network.parameters()}


def test_blocks_can_be_replaced_and_controlled(
    network: FluxTransformer, asked: dict[str, torch.Tensor]
) -> None:
    """A replacement that calls the original changes nothing; a ControlNet adds to the image tokens."""
    module = ComfyNetwork(network)
    plain, seen = step(module, asked, 1.0), []

    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append((args["transformer_options"]["block_type"], args["transformer_options"]["block_index"]))
        return extra["original_block"](args)

    dit = {("double_block", 1): replacement, ("single_block", 0): replacement}
    replaced = step(module, asked, 1.0, options={"patches_replace": {"dit": dit}})
    assert torch.equal(replaced, plain) and seen == [("double", 1), ("single", 0)]
    zero, one = torch.zeros(2, 6, 64), torch.ones(2, 6, 64)
    assert torch.equal(step(module, asked, 1.0, control={"input": [zero, None], "output": [zero]}), plain)
    for control in ({"input": [None, one]}, {"output": [one]}):
        assert not torch.allclose(step(module, asked, 1.0, control=control), plain)


def test_blocks_go_through_the_runner(network: FluxTransformer, asked: dict[str, torch.Tensor]) -> None:
    """That of the MODEL's options, in the blocks' order; other clones of the MODEL have none."""
    module, called = ComfyNetwork(network), []

    def run(block: torch.nn.Module, inputs: tuple[Any, ...], shared: Shared) -> Any:
        called.append(block)
        return block(*inputs, shared)

    wanted = step(module, asked, 0.4)
    assert torch.equal(step(module, asked, 0.4, options={RUNNER: run}), wanted)
    assert called == [*network.double_blocks, *network.single_blocks]


def test_what_has_no_effect_is_named_once_a_run(
    network: FluxTransformer, asked: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    module = ComfyNetwork(network)
    options = {"patches": {"emb_patch": [None]}, "patches_replace": {"attn1": {}}, "some_option": 1}
    for _ in range(2):
        step(module, asked, 1.0, options=options, some_input=2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    for name in ("emb_patch", "attn1", "some_option", "some_input"):
        assert any(name in message for message in messages)


def test_a_patch_made_for_unets_is_refused(network: FluxTransformer, asked: dict[str, torch.Tensor]) -> None:
    def tile(q: Any, k: Any, v: Any, extra_options: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match="tile"):
        step(ComfyNetwork(network), asked, 1.0, options={"patches": {"attn1_patch": [tile]}})


def test_this_file_stands_in_for_comfyui_only_here() -> None:
    assert Path(sys.modules["comfy"].__name__).name == "comfy" and not hasattr(
        sys.modules["comfy"], "__file__"
    )


def test_what_it_attends_by_is_told_of_the_device_that_it_samples_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI may have taken it off the card before the report is written."""
    monkeypatch.setattr(attention, "capability_of", lambda device: (10, 0) if device.type == "cuda" else None)
    module = ComfyNetwork(FluxTransformer(SPEC).bfloat16())
    assert module.attention_name(torch.device("cpu")) == "torch"
    assert module.attention_name(torch.device("cuda")) == "cuDNN through torch"
