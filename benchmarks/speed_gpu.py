"""Case of `bench speed --device cuda`: FLUX.1 in full size against diffusers, eager and compiled.

Ours is compiled block by block (flux_core/backends/compile.py), or eager where it is said why, and for fp8
quantised (flux_core/backends/fp8.py). Theirs is in bf16 throughout, its blocks compiled for each size alone.
Weights are random, and made on the device, one model after the other.
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
from .floors import FP8, matmul_rate, step_flop
from .interleaved import Ratio, Run, compare
from .reference.models import diffusers_of_size
from .speed_comfy import against_comfy
from .speed_inputs import Inputs, difference, diffusers_twin, random_model
from .speed_memory import peak
from .speed_settings import Outcome, Settings, Skipped, Told


@dataclass(frozen=True)
class Plan:
    """Models (name, sizes, steps of a picture), pictures' sides and batches, and when a loop is cut short."""

    models: tuple[tuple[str, FluxSpec, int], ...] = (("dev", FLUX_DEV, 28), ("schnell", FLUX_SCHNELL, 4))
    sides: tuple[int, ...] = (1024, 512)
    batches: tuple[int, ...] = (1, 4)
    forms: tuple[str, ...] = ("bf16", "fp8")
    text: int | None = None
    """Text tokens; None is what the model was trained with."""
    few: int = 3
    """Steps that are measured of a loop that would take longer than `whole` seconds in its turns."""
    whole: float = 60.0
    backend: str = "inductor"
    """What compiles theirs."""

    def groups(self) -> Iterator[tuple[int, str, tuple[str, FluxSpec, int]]]:
        """(batch, form, model), what matters most first."""
        for batch in self.batches:
            for form in self.forms:
                for model in self.models:
                    yield batch, form, model


def full_size(settings: Settings, plan: Plan | None = None) -> Iterator[Outcome]:
    """Loops of whole pictures without text encoders and autoencoder, from prompt vectors to latents."""
    if plan is None and settings.device.type != "cuda":
        yield Skipped("gpu", "for --device cuda")
        return
    plan = plan or Plan()
    rates: dict[str, float] = {}
    for form, dtype in (("bf16", torch.bfloat16), ("fp8", FP8)):
        try:
            rates[form] = matmul_rate(dtype, settings.clock)
        except RuntimeError as error:
            yield Skipped(f"gpu-{form}", f"no product: {first_words(error)}")
        else:
            yield Told(f"matrix product in {form}: {rates[form] / 1e12:.2f} TFLOP/s")
    for batch, form, (name, spec, steps) in plan.groups():
        group = f"{name}-{form}-{batch}"
        if settings.is_over or form not in rates:
            why = "the time is over" if settings.is_over else f"{form} cannot be multiplied here"
            yield Skipped(group, why)
            continue
        try:
            yield from Group(group, spec, steps, batch, form, rates, plan, settings).measured()
        except RuntimeError as error:  # out of memory, or what compiling stumbles over
            yield Skipped(group, first_words(error))
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Group:
    """One model in one form, at all sides."""

    name: str
    spec: FluxSpec
    steps: int
    batch: int
    form: str
    rates: dict[str, float]
    plan: Plan
    settings: Settings

    def measured(self) -> Iterator[Outcome]:
        """Raises RuntimeError where the memory is full, and where a compiler fails."""
        torch.manual_seed(0)
        torch.compiler.reset()
        settings, need = self.settings, self.bytes_needed
        if settings.device.type == "cuda" and (free := torch.cuda.mem_get_info(settings.device)[0]) < need:
            yield Skipped(self.name, f"needs {need / 1e9:.0f} GB, the card has {free / 1e9:.0f} GB free")
            return
        model = random_model(self.spec, torch.bfloat16, settings.device)
        eager = diffusers_twin(model)
        compiled: Any = copy_with_same_weights(eager, self.spec)
        compiled.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=self.plan.backend)
        if self.form == "fp8":
            quantize_to_fp8(model)
        model, why = compiled_or_not(model)
        yield Told(f"{self.name}: ours is {f'eager, {why}' if why else 'compiled'}")
        for side in self.plan.sides:
            yield from self.at(side, model, eager, compiled, "eager" if why else "compiled")

    @property
    def bytes_needed(self) -> int:
        """Both sides' weights, and room for activations."""
        with torch.device("meta"):
            numbers = sum(p.numel() for p in FluxTransformer(self.spec).parameters())
        return 4 * numbers + 10**10

    def at(
        self, side: int, model: FluxTransformer, eager: nn.Module, compiled: nn.Module, how: str
    ) -> Iterator[Outcome]:
        """Everything at one side of pictures."""
        case, settings = f"{self.name}-{side}", self.settings
        if settings.is_over:
            yield Skipped(case, "the time is over")
            return
        length = self.plan.text or self.spec.txt_length
        inputs = Inputs(model, side, length, self.batch)
        yield Told(f"{case}: attention through {attention_backend_name(model)}")
        ours, run_eager = inputs.our_step(model), inputs.their_step(eager)
        started = time.perf_counter()
        first = ours()
        warm = time.perf_counter()
        far = difference(first, run_eager())
        yield Told(f"{case}: first step {warm - started:.1f} s, largest difference {far:.1e} of the largest")
        yield self.memory(case, ours, run_eager)
        yield from self.loops(case, inputs, model, eager, compiled, how)
        if self.form == "bf16" and self.batch == 1:  # one step says it all, and its weights are another copy
            yield from against_comfy(case, model, inputs, settings)

    def memory(self, case: str, ours: Run, theirs: Run) -> Outcome:
        """What a step takes above the weights."""
        taken, more = (max(1, peak(run, self.settings)) for run in (ours, theirs))
        ratio, note = more / taken, "a step, above the weights"
        return Ratio(f"memory-{case}", ratio, ratio, ratio, 1, taken, more, note, "MB")

    def loops(
        self,
        case: str,
        inputs: Inputs,
        model: FluxTransformer,
        eager: nn.Module,
        compiled: nn.Module,
        how: str,
    ) -> Iterator[Outcome]:
        """Ratios to diffusers eager and compiled, and how near ours is to what the card does."""
        settings = self.settings
        tokens = inputs.h * inputs.w // 4
        sigmas = make_sigmas(self.steps, tokens, shift="none").tolist()
        for theirs, name in ((eager, "eager"), (compiled, "compiled")):
            against = f"{case}-{name}"
            if settings.is_over:
                yield Skipped(against, "the time is over")
                continue
            inputs.their_step(theirs)()  # here it is compiled
            step = settings.clock.seconds(inputs.their_step(theirs))
            short = self.steps > self.plan.few and 8 * self.steps * step > self.plan.whole
            count = self.plan.few if short else self.steps
            some = sigmas[: count + 1]
            run, other = inputs.our_loop(model, some), inputs.their_loop(theirs, some)
            note = f"ours {how}, {self.steps} steps" + (f" from {count}" if short else "")
            ratio = compare(against, run, other, settings.clock, settings.budget, note)
            factor = self.steps / count
            ratio = replace(ratio, ours=factor * ratio.ours, theirs=factor * ratio.theirs)
            yield ratio
            yield Told(self.achieved(against, ratio, tokens, inputs.prompt.txt.shape[1]))

    def achieved(self, case: str, ratio: Ratio, image_tokens: int, text_tokens: int) -> str:
        """Rates of both sides, and ours as a part of what the products would allow."""
        flop = step_flop(self.spec, text_tokens, image_tokens, self.batch)
        ours, theirs = ratio.ours / self.steps, ratio.theirs / self.steps
        least = flop.seconds(self.rates[self.form], self.rates["bf16"])
        return (
            f"{case}: a step of {flop.total / 1e12:.4g} TFLOP, ours {1000 * ours:.1f} ms, "
            f"{flop.total / ours / 1e12:.4g} TFLOP/s, {100 * least / ours:.1f} % of the matrix product's "
            f"rate; theirs {flop.total / theirs / 1e12:.4g} TFLOP/s"
        )


def copy_with_same_weights(twin: nn.Module, spec: FluxSpec) -> nn.Module:
    """Another of diffusers' transformers that shares the weights, to be compiled."""
    with torch.device("meta"):
        other = diffusers_of_size(spec)
    other.load_state_dict(twin.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def compiled_or_not(model: FluxTransformer) -> tuple[FluxTransformer, str]:
    """The model with compiled blocks; or itself, and why it could not be compiled."""
    try:
        return compile_blocks(model), ""
    except ValueError as error:
        return model, first_words(error)


def first_words(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:120]
