"""MODEL -> MODEL whose blocks run compiled (flux_core/backends/compile.py)."""

from __future__ import annotations

from ..flux_core.backends.compile import MODES
from .host import current_host
from .widgets import choice, wire


class Compile:
    """Compiles the blocks with torch.compile, for faster steps on a GPU. The first run waits for it."""

    NODE_ID = "RectifluxCompile"
    TITLE = "Compile FLUX"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The model, compiled at its first run. The input model is not changed.",)
    SEARCH_ALIASES = "torch compile, torch.compile, inductor, triton, cuda graphs, faster, speed".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        mode = "cuda graphs removes the launch overhead of small models on a CUDA GPU. It takes more memory."
        return {
            "required": {"model": wire("MODEL", "A model from Load FLUX Model, with or without LoRAs.")},
            "optional": {"mode": choice(MODES, mode, default="default")},
        }

    def run(self, model, mode="default"):
        return (current_host().with_compiling(model, mode),)


NODES = (Compile,)
