"""ComfyUI's side of sampling: our solvers as its SAMPLER, and FLUX Sampler through its guider.

ComfyUI is imported at the time of the call. What is relied on, as of ComfyUI 0.33: comfy/samplers.py
CFGGuider and KSAMPLER, comfy/model_sampling.py CONST, latent_preview.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..flux_core.pipeline import LATENT_CHANNELS
from ..flux_core.sampling.solver import Report, Solver, Step, integrate, seeded_noise
from .conditioning_wires import checked_conditioning, with_guidance
from .host_comfy_network import ComfyNetwork
from .run_report import Stopwatch, report_text, skipped
from .wires import SamplerInputs, checked_finite


def make_sampler(solver: Solver) -> Any:
    """A comfy.samplers.KSAMPLER that takes the solver's steps."""
    import comfy.samplers

    return comfy.samplers.KSAMPLER(solve, {"solver": solver})


def solve(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    solver: Solver,
    on_report: Callable[[Report], None] | None = None,
) -> Tensor:
    """x integrated along the sigmas; x itself where a split schedule leaves no step, as ComfyUI's samplers.

    ComfyUI's model returns denoised; velocity = (x - denoised) / sigma.

    A stochastic solver draws its noise from the run's seed, which every sampler node passes on.
    """
    extra_args = extra_args or {}
    if len(sigmas) < 2:
        return x

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return (x - model(x, x.new_full((x.shape[0],), sigma), **extra_args)) / sigma

    def report(step: Step) -> None:
        state = {
            "i": step.index,
            "x": step.x,
            "sigma": step.sigma,
            "sigma_hat": step.sigma,
            "denoised": step.denoised,
        }
        if callback is not None:
            callback(state)

    noise = seeded_noise(extra_args.get("seed") or 0)
    return integrate(solver, velocity, x, sigmas, report, noise=noise, on_report=on_report)


def sample(inputs: SamplerInputs) -> tuple[Tensor, str]:
    """The raw latent from ComfyUI's guider, with patches, previews and interruption, and the run's report."""
    import comfy.model_management as management
    import comfy.samplers
    import latent_preview

    model, sampler = inputs.model, inputs.sampler
    check_model(model)
    network = model.model.diffusion_model
    if isinstance(network, ComfyNetwork):
        network.check_unchanged()
    guider = _guider(inputs)
    reports: list[Report] = []
    if getattr(sampler, "sampler_function", None) is solve:
        options = {**sampler.extra_options, "on_report": reports.append}
        sampler = comfy.samplers.KSAMPLER(solve, options, sampler.inpaint_options)
    watch = Stopwatch(latent_preview.prepare_callback(model, inputs.steps))
    raw_latent = guider.sample(
        inputs.drawn_noise(),
        inputs.raw_latent,
        sampler,
        inputs.sigmas,
        denoise_mask=inputs.noise_mask,
        callback=watch,
        disable_pbar=not _has_progress_bars(),
        seed=inputs.noise.seed,
    )
    report = reports[0] if reports else foreign_report(sampler, guider.evaluations, len(watch.seconds))
    checked_finite(raw_latent, "the sampled values", "choose bf16 or fp32 as weight_dtype", network)
    attention = network.attention_name(model.load_device) if isinstance(network, ComfyNetwork) else None
    text = report_text(report, watch.seconds, skipped(getattr(network, "caches", [])), attention)
    checked_finite(raw_latent, "the sampled values", "choose bf16 or fp32 as weight_dtype")
    return raw_latent.to(management.intermediate_device()), text


def _guider(inputs: SamplerInputs) -> Any:
    """A comfy.samplers.CFGGuider of the prompts, with guidance down to a sigma, that counts `evaluations`."""
    import comfy.samplers

    positive, negative = inputs.positive, inputs.negative
    cfg = 1.0 if negative is None else inputs.cfg_scale

    class Guider(comfy.samplers.CFGGuider):
        """Counts the model calls of any sampler; below `cfg_until` the scale is 1."""

        evaluations = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.evaluations += 1
            return super().__call__(*args, **kwargs)

        def predict_noise(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.set_cfg(cfg if float(timestep[0]) >= inputs.cfg_until else 1.0)
            return super().predict_noise(x, timestep, *args, **kwargs)

    guider = Guider(inputs.model)
    conds = {"positive": checked_conditioning(positive, "positive")}
    if negative is not None and cfg != 1.0:
        guidance = positive[0][1].get("guidance")
        checked = checked_conditioning(negative, "negative")
        conds["negative"] = checked if guidance is None else with_guidance(checked, guidance)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    return guider


def foreign_report(sampler: Any, evaluations: int, steps: int) -> Report:
    """The report of a run of another pack's sampler: without error and straightness."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    return Report(name, evaluations, steps, 0, None, None)


def _has_progress_bars() -> bool:
    import comfy.utils

    return comfy.utils.PROGRESS_BAR_ENABLED


def check_model(model: Any) -> None:
    """Raise TypeError unless the MODEL is a rectified flow on FLUX.1's 16-channel latents."""
    import comfy.model_sampling

    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    channels = model.get_model_object("latent_format").latent_channels
    if not flow or channels != LATENT_CHANNELS:
        what = f"{channels} latent channels" if flow else "no rectified flow"
        raise TypeError(
            f"FLUX Sampler needs a FLUX.1 model, this MODEL ({type(model.model).__name__}) has {what}; "
            "connect Load FLUX Model"
        )
