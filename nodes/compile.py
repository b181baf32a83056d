"""MODEL -> MODEL whose blocks run compiled. The work is flux_core/backends/compile.py's."""

from __future__ import annotations

from . import host_embedded as _host


class Compile:
    """Compiles the blocks: for graphics cards, no gain on a CPU. The first run waits for it."""

    NODE_ID = "RectifluxCompile"
    TITLE = "Compile FLUX"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, compiled when it first runs. The model that came in stays as it was.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["torch compile", "torch.compile", "inductor", "triton", "faster", "speed"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model from Load FLUX Model, with or without LoRAs."}),
            }
        }

    def run(self, model):
        return (_host.with_compiling(model),)


NODES = (Compile,)
