"""ComfyUI's side of sampling: our solvers as its SAMPLER, and FLUX Sampler through its guider.

As in _comfy.py, ComfyUI is imported at the time of the call. What is relied on, as of ComfyUI 0.33:
comfy/samplers.py CFGGuider and KSAMPLER, comfy/model_sampling.py CONST, latent_preview.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..flux_core.pipeline import LATENT_CHANNELS
from ..flux_core.sampling.solver import Report, Solver, Step, integrate, seeded_noise
from . import wires as _wires
from .host_comfy_network import ComfyNetwork
from .run_report import Stopwatch, report_text, skipped


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
    """x carried along the sigmas. ComfyUI's model gives the denoised x; velocity = (x - denoised) / sigma.

    A stochastic solver draws its noise from the run's seed, which every sampler node hands on.
    """
    extra_args = extra_args or {}

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return (x - model(x, x.new_full((x.shape[0],), sigma), **extra_args)) / sigma

    def report(step: Step) -> None:
        told = {
            "i": step.index,
            "x": step.x,
            "sigma": step.sigma,
            "sigma_hat": step.sigma,
            "denoised": step.denoised,
        }
        if callback is not None:
            callback(told)

    noise = seeded_noise(extra_args.get("seed") or 0)
    return integrate(solver, velocity, x, sigmas, report, noise=noise, on_report=on_report)


def sample(
    model: Any,
    positive: _wires.Entries,
    negative: _wires.Entries | None,
    cfg_scale: float,
    noise: Any,
    latent: _wires.Latent,
    sigmas: Tensor,
    sampler: Any,
    cfg_until: float,
) -> tuple[Tensor, str]:
    """Raw samples through ComfyUI's guider, so that patches, previews and the interrupt button work, and the
    run's report.
    """
    import comfy.model_management as management
    import comfy.samplers
    import latent_preview

    check_model(model)
    guider = _guider(model, positive, negative, cfg_scale, cfg_until)
    told: list[Report] = []
    if getattr(sampler, "sampler_function", None) is solve:
        options = {**sampler.extra_options, "on_report": told.append}
        sampler = comfy.samplers.KSAMPLER(solve, options, sampler.inpaint_options)
    watch = Stopwatch(latent_preview.prepare_callback(model, len(sigmas) - 1))
    samples = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=watch,
        disable_pbar=not _progress_bars(),
        seed=noise.seed,
    )
    report = told[0] if told else other_report(sampler, guider.evaluations, len(watch.seconds))
    network = model.model.diffusion_model
    attends = network.attention_name(model.load_device) if isinstance(network, ComfyNetwork) else None
    text = report_text(report, watch.seconds, skipped(getattr(network, "caches", [])), attends)
    return samples.to(management.intermediate_device()), text


def _guider(
    model: Any,
    positive: _wires.Entries,
    negative: _wires.Entries | None,
    cfg_scale: float,
    cfg_until: float,
) -> Any:
    """A comfy.samplers.CFGGuider of these prompts, guided down to a sigma, that also counts `evaluations`."""
    import comfy.samplers

    cfg = 1.0 if negative is None else cfg_scale

    class Guider(comfy.samplers.CFGGuider):
        """Counts what any sampler asks of it; below `cfg_until` as at a scale of 1."""

        evaluations = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.evaluations += 1
            return super().__call__(*args, **kwargs)

        def predict_noise(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.set_cfg(cfg if float(timestep[0]) >= cfg_until else 1.0)
            return super().predict_noise(x, timestep, *args, **kwargs)

    guider = Guider(model)
    conds = {"positive": _wires.checked_conditioning(positive, "positive")}
    if negative is not None and cfg != 1.0:
        guidance = positive[0][1].get("guidance")
        checked = _wires.checked_conditioning(negative, "negative")
        conds["negative"] = checked if guidance is None else _wires.with_guidance(checked, guidance)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    return guider


def other_report(sampler: Any, evaluations: int, steps: int) -> Report:
    """What can be said of a run of a sampler that is not ours."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    return Report(name, evaluations, steps, 0, None, None)


def _progress_bars() -> bool:
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
