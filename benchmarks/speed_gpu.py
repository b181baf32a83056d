"""Case of `bench speed --device cuda`: FLUX.1 in full size against diffusers, eager and compiled.

Ours is compiled block by block (flux_core/backends/compile.py), or eager with the reason printed, and in fp8
quantized by flux_core/backends/fp8.py. Theirs is in bf16 throughout, its blocks compiled for one size at a
time. Weights are random and created on the device, one model after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..flux_core.backends.attention import attention_backend_name
from ..flux_core.backends.compile import compile_blocks
from ..flux_core.backends.quantize import quantize_to_fp8
from ..flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.sampling.schedule import make_sigmas
from .floors import FP8, QUICK_SIDES, matmul_rate, step_flop
from .interleaved import Effort, Ratio, Run, compare
from .reference.models import diffusers_of_size
from .speed_comfy import against_comfy
from .speed_inputs import Inputs, difference, diffusers_twin, random_model
from .speed_memory import peak
from .speed_settings import TIME_IS_UP, Note, Outcome, Settings, Skipped


@dataclass(frozen=True)
class Plan:
    """What to measure: models as (name, sizes, steps of an image), sides, batches and dtypes."""

    models: tuple[tuple[str, FluxSpec, int], ...] = (("dev", FLUX_DEV, 28), ("schnell", FLUX_SCHNELL, 4))
    sides: tuple[int, ...] = (1024, 512)
    batches: tuple[int, ...] = (1, 4)
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    text_tokens: int | None = None
    """None is the length that the model was trained with."""
    long_loop: float = 60.0
    """A loop that would take more seconds than this is shortened to `few` steps."""
    few: int = 3
    backend: str = "inductor"
    """torch.compile's backend for theirs."""

    def groups(self) -> Iterator[tuple[int, str, tuple[str, FluxSpec, int]]]:
        """(batch, dtype, model), the most important first."""
        for batch in self.batches:
            for dtype in self.dtypes:
                for model in self.models:
                    yield batch, dtype, model


def full_size(settings: Settings, plan: Plan | None = None) -> Iterator[Outcome]:
    """Whole sampling loops from prompt embeddings to latents, without text encoders and autoencoder."""
    if plan is None and settings.device.type != "cuda":
        yield Skipped("gpu", "for --device cuda")
        return
    plan = plan or Plan()
    rates: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8)):
        try:
            rates[name] = matmul_rate(dtype, settings.clock, QUICK_SIDES if settings.quick else None)
        except RuntimeError as error:
            yield Skipped(f"gpu-{name}", f"no matmul: {one_line(error)}")
        else:
            yield Note(f"matmul in {name}: {rates[name] / 1e12:.2f} TFLOP/s")
    for batch, dtype, (name, spec, steps) in plan.groups():
        group = f"{name}-{dtype}-{batch}"
        if settings.is_time_up or dtype not in rates:
            reason = TIME_IS_UP if settings.is_time_up else f"this device has no matmul in {dtype}"
            yield Skipped(group, reason)
            continue
        try:
            yield from Group(group, spec, steps, batch, dtype, rates, plan, settings).measure()
        except RuntimeError as error:  # out of memory, or the compiler failed
            yield Skipped(group, one_line(error))
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Group:
    """One model in one dtype and batch size, at all sides."""

    name: str
    spec: FluxSpec
    steps: int
    batch: int
    dtype: str
    rates: dict[str, float]
    plan: Plan
    settings: Settings

    def measure(self) -> Iterator[Outcome]:
        """Raises RuntimeError where the memory is full, and where a compiler fails."""
        torch.manual_seed(0)
        torch.compiler.reset()
        settings, need = self.settings, self.bytes_needed
        if settings.device.type == "cuda" and (free := torch.cuda.mem_get_info(settings.device)[0]) < need:
            yield Skipped(self.name, f"needs {need / 1e9:.0f} GB, the card has {free / 1e9:.0f} GB free")
            return
        model = random_model(self.spec, torch.bfloat16, settings.device)
        eager = diffusers_twin(model)
        compiled: Any = shared_weights_copy(eager, self.spec)
        compiled.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=self.plan.backend)
        if self.dtype == "fp8":
            quantize_to_fp8(model)
        model, reason = compiled_or_eager(model)
        ours = "eager" if reason else "compiled"
        yield Note(f"{self.name}: ours is {ours}{f', {reason}' if reason else ''}")
        for side in self.plan.sides:
            case = f"{self.name}-{side}"
            if settings.is_time_up:
                yield Skipped(case, TIME_IS_UP)
                continue
            inputs = Inputs(model, side, self.plan.text_tokens or self.spec.txt_length, self.batch)
            yield from self.first_steps(case, inputs, model, eager)
            for theirs, name in ((eager, "eager"), (compiled, "compiled")):
                yield from self.loop(f"{case}-{name}", inputs, model, theirs, ours)
            if self.dtype == "bf16" and self.batch == 1:  # its weights are one more copy
                yield from against_comfy(case, model, inputs, settings)

    @property
    def bytes_needed(self) -> int:
        """Both sides' weights, and room for activations."""
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FluxTransformer(self.spec).parameters())
        return 4 * parameters + 10**10

    def first_steps(
        self, case: str, inputs: Inputs, model: FluxTransformer, eager: nn.Module
    ) -> Iterator[Outcome]:
        """Attention backend, seconds of the first step (it compiles), difference and memory of a step."""
        yield Note(f"{case}: attention through {attention_backend_name(model)}")
        ours, theirs = inputs.our_step(model), inputs.their_step(eager)
        start = time.perf_counter()
        first = ours()
        seconds = time.perf_counter() - start
        error = difference(first, theirs())
        yield Note(f"{case}: first step {seconds:.1f} s, largest difference {error:.1e} of the largest value")
        yield memory_ratio(case, ours, theirs, self.settings)

    def loop(
        self, case: str, inputs: Inputs, model: FluxTransformer, theirs: nn.Module, ours: str
    ) -> Iterator[Outcome]:
        """The ratio of whole loops, and both sides' FLOP rates."""
        settings = self.settings
        if settings.is_time_up:
            yield Skipped(case, TIME_IS_UP)
            return
        tokens = inputs.h * inputs.w // 4
        inputs.their_step(theirs)()  # compiles
        step = settings.clock.seconds(inputs.their_step(theirs))
        is_long = self.steps > self.plan.few and 8 * self.steps * step > self.plan.long_loop
        count = self.plan.few if is_long else self.steps
        sigmas = make_sigmas(self.steps, tokens, shift="none").tolist()[: count + 1]
        run, other = inputs.our_loop(model, sigmas), inputs.their_loop(theirs, sigmas)
        note = f"ours {ours}, {self.steps} steps" + (f" from {count}" if is_long else "")
        ratio = compare(case, run, other, settings.clock, Effort(settings.budget), note)
        factor = self.steps / count
        ratio = replace(ratio, ours=factor * ratio.ours, theirs=factor * ratio.theirs)
        yield ratio
        yield Note(self.rates_line(ratio, tokens, inputs.prompt.txt.shape[1]))

    def rates_line(self, ratio: Ratio, image_tokens: int, text_tokens: int) -> str:
        """FLOP rates of both sides, and ours as a share of the matmul rate."""
        flop = step_flop(self.spec, text_tokens, image_tokens, self.batch)
        ours, theirs = ratio.ours / self.steps, ratio.theirs / self.steps
        least = flop.seconds(self.rates[self.dtype], self.rates["bf16"])
        return (
            f"{ratio.case}: a step of {flop.total / 1e12:.4g} TFLOP, ours {1000 * ours:.1f} ms, "
            f"{flop.total / ours / 1e12:.4g} TFLOP/s, {100 * least / ours:.1f} % of the matmul rate; "
            f"theirs {flop.total / theirs / 1e12:.4g} TFLOP/s"
        )


def memory_ratio(case: str, ours: Run, theirs: Run, settings: Settings) -> Ratio:
    """Peak bytes of a step above the weights."""
    our_peak, their_peak = (max(1, peak(run, settings)) for run in (ours, theirs))
    ratio = their_peak / our_peak
    note = "a step, above the weights"
    return Ratio(f"memory-{case}", ratio, ratio, ratio, 1, our_peak, their_peak, note, "MB")


def shared_weights_copy(twin: nn.Module, spec: FluxSpec) -> nn.Module:
    """Another of diffusers' transformers with the same weight tensors, to be compiled."""
    with torch.device("meta"):
        other = diffusers_of_size(spec)
    other.load_state_dict(twin.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def compiled_or_eager(model: FluxTransformer) -> tuple[FluxTransformer, str]:
    """(model with compiled blocks, ""), or (the model itself, the reason why it cannot be compiled)."""
    try:
        return compile_blocks(model), ""
    except ValueError as error:
        return model, one_line(error)


def one_line(error: Exception) -> str:
    """The first 120 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:120]
