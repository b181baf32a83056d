"""Small prompts in the API format, and the shortest possible way to run one without a host."""

from __future__ import annotations

from typing import Any

from rectiflux.nodes import NODE_CLASS_MAPPINGS

Prompt = dict[str, Any]


def loaders(model: str, clip: str, t5: str, vae: str, weight_dtype: str = "auto") -> Prompt:
    return {
        "model": node("RectifluxModelLoader", model_name=model, weight_dtype=weight_dtype),
        "clip": node("RectifluxTextEncoderLoader", clip_name=clip, t5_name=t5),
        "vae": node("RectifluxVAELoader", vae_name=vae),
    }


def text_to_image(
    files: Prompt,
    *,
    prompt: str = "a red circle on white",
    seed: int = 7,
    steps: int = 4,
    solver: str = "euler",
    cfg_scale: float = 3.0,
    cfg_until: float | None = None,
    width: int = 64,
    height: int = 48,
    batch_size: int = 1,
    **schedule: Any,
) -> Prompt:
    """Our own nodes from loaders to a decoded image at node "decode"."""
    plan = {"steps": steps, "denoise": 1.0, "shift": "by size", "mu": 1.15, **schedule}
    return {
        **files,
        "positive": node("RectifluxTextEncode", clip=["clip", 0], prompt=prompt, guidance=3.5),
        "negative": node("RectifluxNegativePrompt", clip=["clip", 0], negative_prompt=""),
        "latent": node("RectifluxEmptyLatent", width=width, height=height, batch_size=batch_size),
        "noise": node("RectifluxNoise", seed=seed),
        "schedule": node("RectifluxSchedule", latent=["latent", 0], **plan),
        "solver": node("RectifluxSolver", solver=solver),
        "sample": node(
            "RectifluxSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            noise=["noise", 0],
            sampler=["solver", 0],
            sigmas=["schedule", 0],
            latent=["latent", 0],
            cfg_scale=cfg_scale,
            **({} if cfg_until is None else {"cfg_until": cfg_until}),
        ),
        "decode": node("RectifluxVAEDecode", samples=["sample", 0], vae=["vae", 0]),
    }


def node(class_type: str, **inputs: Any) -> Prompt:
    return {"class_type": class_type, "inputs": inputs}


def run(prompt: Prompt, target: str, done: dict[str, tuple[Any, ...]] | None = None) -> tuple[Any, ...]:
    """The outputs of the node `target`, after those that it depends on."""
    done = {} if done is None else done
    if target not in done:
        kind = NODE_CLASS_MAPPINGS[prompt[target]["class_type"]]
        inputs = {
            name: run(prompt, value[0], done)[value[1]] if isinstance(value, list) else value
            for name, value in prompt[target]["inputs"].items()
        }
        done[target] = getattr(kind(), kind.FUNCTION)(**inputs)
    return done[target]
