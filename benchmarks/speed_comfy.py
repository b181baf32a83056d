"""ComfyUI's own FLUX in `bench speed`, if COMFYUI_PATH names a checkout that can be imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..flux_core.model.transformer import FluxTransformer, unpack
from .interleaved import Effort, compare
from .speed_inputs import Inputs, difference
from .speed_settings import TIME_IS_UP, Note, Outcome, Settings, Skipped


def against_comfy(case: str, model: FluxTransformer, inputs: Inputs, settings: Settings) -> Iterator[Outcome]:
    """A step against ComfyUI's own Flux, with our weights."""
    name, path = f"{case}-comfyui", os.environ.get("COMFYUI_PATH")
    if not path or settings.is_time_up:
        yield Skipped(name, TIME_IS_UP if path else "COMFYUI_PATH does not name a ComfyUI checkout")
        return
    try:
        comfy = comfy_model(model, path)
    except (ImportError, AssertionError, RuntimeError, OSError) as error:
        yield Skipped(name, f"ComfyUI's Flux does not run here: {' '.join(str(error).split())[:120]}")
        return
    run, theirs = inputs.our_step(model), inputs.comfy_step(comfy)
    latent = unpack(run(), inputs.h, inputs.w)
    yield Note(f"{name}: largest difference {difference(latent, theirs()):.1e} of the largest value")
    yield compare(name, run, theirs, settings.clock, Effort(settings.budget, warm=True))


def comfy_model(model: FluxTransformer, path: str) -> Any:
    """ComfyUI's Flux with our weights. ComfyUI parses sys.argv when imported, so it gets an empty one."""
    if path not in sys.path:
        sys.path.insert(0, path)
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        options: Any = importlib.import_module("comfy.cli_args")
        options.args.cpu = model.device.type == "cpu"
        flux = importlib.import_module("comfy.ldm.flux.model")
        operations = importlib.import_module("comfy.ops").disable_weight_init
    finally:
        sys.argv = given
    spec = model.spec
    twin = flux.Flux(
        in_channels=spec.in_channels // 4,
        out_channels=spec.out_channels // 4,
        vec_in_dim=spec.vec_in,
        context_in_dim=spec.context_in,
        hidden_size=spec.hidden_size,
        mlp_ratio=spec.mlp_ratio,
        num_heads=spec.num_heads,
        depth=spec.depth,
        depth_single_blocks=spec.depth_single,
        axes_dim=list(spec.axes_dim),
        theta=spec.theta,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=spec.guidance_embed,
        txt_ids_dims=[],
        dtype=model.dtype,
        device=model.device,
        operations=operations,
    )
    wanted = twin.state_dict()
    state = model.state_dict()
    twin.load_state_dict(
        {n if n in wanted else n.removesuffix("scale") + "weight": tensor for n, tensor in state.items()}
    )
    return twin.requires_grad_(False).eval()
