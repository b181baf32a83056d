"""FLUX.1 in plain torch: a library that knows nothing of the nodes or of the host it runs in.

  spec.py          the letters of every shape, sizes of a model, what a prompt becomes, what a solver sees
  conditioning.py  prompt -> T5 sequence and CLIP vector
  schedule.py      steps, number of image tokens -> sigmas
  solver/          velocity, sigmas -> the path from noise to picture
  transformer.py   tokens, prompt, sigma -> velocity (its parts are in layers.py)
  vae.py           image <-> latent; tiling.py: in strips (strips.py), where memory is short
  pipeline.py      all of these in eight numbered steps: text to image
  preview.py       a latent as a small picture, cheaply
  sheet.py         pictures side by side, with labels
  weights/         files in, modules out
  lora/            LoRAs in, a model with them attached out
  stored.py        linear layers over weights as their file keeps them (forms.py, dequantize.py)
  streaming/       a model larger than the memory: blocks come in just ahead of use
  caching.py       steps whose deeper blocks are forecast instead of computed
  attention.py     which backend computes attention, by the card and by what is installed
                   (attention_cpu.py: by oneDNN, for processors on which torch's own is slow)
  compiling.py     one torch.compile for all blocks of a kind
  graphs.py        small steps recorded and done in one piece: CUDA graphs, or recorder.py on a CPU
  fused/           passes between the products joined (Triton, optional)
  packed.py        linear layers in the processor's order, exact or in int8 (packing.py: which of a model)
  fp8.py           linear layers that multiply in 8-bit floats
  flow/            the theory: paths, predictions, objectives, couplings, likelihoods
  train/           how the miniatures in models/ are made

The five stages (conditioning, schedule, solver, transformer, vae) do not import each other: they meet in
pipeline.py, by numbers and tensors. What `__all__` names is the public interface; the rest may change.
"""

from .model.autoencoder import AutoEncoder, AutoEncoderSpec, to_model_space, to_vae_space
from .model.spec import FLUX_DEV, FLUX_SCHNELL, Conditioning, FluxSpec, Velocity
from .model.text_encoders import TextEncoders
from .model.transformer import FluxTransformer, Prepared, pack, unpack
from .pipeline import Models, draw_noise, guided_velocity, latent_size, sample, text_to_image
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
