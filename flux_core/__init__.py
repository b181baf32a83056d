"""FLUX.1 in plain torch: a library that knows nothing of the nodes or of the host it runs in.

  pipeline.py      text to image in eight numbered steps, image to image, inpainting: joins the stages
  model/           sizes, text encoders, transformer, autoencoder: the reference forward, plain torch
                   (layers.py: the blocks; ops.py: their arithmetic; hooks.py: hooks of the block loop)
  sampling/        schedule, solvers, step cache, preview
  tools/           image conditioning: where reference images stand
  lora/            LoRA files in, a model with adapters out
  weights/         checkpoint files in, modules out
  quant/           quantized formats and the linear layers that keep them
  backends/        faster ways to compute the same operations: attention, CPU packing, int8, fp8, compile
  memory/          streaming of blocks, tiled decoding, memory limits
  flow/            the theory: paths, predictions, objectives, couplings, likelihoods
  train/           training loop, optimizers, checkpoints, distillation, reflow
  contact_sheet.py images side by side, with labels

The stages (text encoders, schedule, solver, transformer, autoencoder) do not import each other: they meet in
pipeline.py, through tensors and small frozen dataclasses. Shapes are written in the letters of
model/spec.py. What `__all__` names is the public interface; the rest may change.
"""

from .model.autoencoder import AutoEncoder, AutoEncoderSpec, to_model_space, to_vae_space
from .model.hooks import Hooks
from .model.spec import FLUX_DEV, FLUX_SCHNELL, Conditioning, FluxSpec, Velocity
from .model.text_encoders import TextEncoders
from .model.transformer import FluxTransformer, Prepared, TokenGroup, pack, unpack
from .pipeline import (
    Guidance,
    Models,
    SampleRequest,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    latent_size,
    sample,
    text_to_image,
)
from .sampling.schedule import make_sigmas, mu_for_tokens, shift_sigmas
from .sampling.solver import (
    SOLVERS,
    DormandPrince,
    EulerAncestral,
    Report,
    Solver,
    Step,
    integrate,
    seeded_noise,
)
from .weights import load_autoencoder, load_text_encoders, load_transformer, read_state_dict

__all__ = [
    "VelocityRequest",
    "TokenGroup",
    "SampleRequest",
    "Hooks",
    "Guidance",
    "FLUX_DEV",
    "FLUX_SCHNELL",
    "SOLVERS",
    "AutoEncoder",
    "AutoEncoderSpec",
    "Conditioning",
    "DormandPrince",
    "EulerAncestral",
    "FluxSpec",
    "FluxTransformer",
    "Models",
    "Prepared",
    "Report",
    "Solver",
    "Step",
    "TextEncoders",
    "Velocity",
    "draw_noise",
    "guided_velocity",
    "integrate",
    "latent_size",
    "load_autoencoder",
    "load_text_encoders",
    "load_transformer",
    "make_sigmas",
    "mu_for_tokens",
    "pack",
    "read_state_dict",
    "sample",
    "seeded_noise",
    "shift_sigmas",
    "text_to_image",
    "to_model_space",
    "to_vae_space",
    "unpack",
]
