"""The nodes, one file per stage in the order in which data passes; a node's mathematics is in flux_core/.

  loader.py         files -> MODEL, CLIP, VAE, about
  lora.py           file, MODEL, CLIP -> MODEL, CLIP, report
  conditioning.py   CLIP, prompt -> CONDITIONING
  latent.py         width, height -> LATENT
  noise.py          seed -> NOISE
  schedule.py       LATENT, steps -> SIGMAS
  solver.py         name, or a method's settings -> SAMPLER
  caching.py        MODEL -> MODEL that skips steps
  compiling.py      MODEL -> MODEL whose blocks are compiled
  sampler.py        all of these -> LATENT, report
  vae.py            LATENT -> IMAGE and back
  sheet.py          IMAGEs -> one IMAGE to compare them
  _models.py        files and folders in a loader's list, and what a name in it means
  _wires.py         what travels between nodes, checked and converted to what flux_core takes
  _report.py        what a load or a run tells of itself
  _memory.py        what to do when memory is full
  _host.py          which host runs the nodes; the embedded editor's side
  _comfy.py         ComfyUI's side, with _comfy_text.py, _comfy_sampling.py, _comfy_lora.py, with
                    _comfy_modules.py, our networks in the form in which it calls them, and _comfy_stored.py,
                    layers that stay quantised under its patches

Only _host.py and the six _comfy files know a host. Node ids never change; titles may.
"""

from . import compile as compiling
from . import conditioning, latent, loader, lora, noise, sampler, schedule, solver, vae
from . import contact_sheet as sheet
from . import step_cache as caching

NODES = (
    *loader.NODES,
    *lora.NODES,
    *conditioning.NODES,
    *latent.NODES,
    *noise.NODES,
    *schedule.NODES,
    *solver.NODES,
    *caching.NODES,
    *compiling.NODES,
    *sampler.NODES,
    *vae.NODES,
    *sheet.NODES,
)

NODE_CLASS_MAPPINGS = {node.NODE_ID: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.NODE_ID: node.TITLE for node in NODES}

__all__ = ["NODES", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
