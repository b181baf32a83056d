"""The nodes, one file per stage in the order of the data; they convert, call flux_core, and convert back.

  loader.py         files -> MODEL, CLIP, VAE, about
  lora.py           file, MODEL, CLIP -> MODEL, CLIP, report
  conditioning.py   CLIP, prompt -> CONDITIONING
  latent.py         width, height -> LATENT
  noise.py          seed -> NOISE
  schedule.py       LATENT, steps -> SIGMAS
  solver.py         name, or a method's settings -> SAMPLER
  step_cache.py     MODEL -> MODEL that skips blocks
  compile.py        MODEL -> MODEL whose blocks are compiled
  sampler.py        all of these -> LATENT, report
  vae.py            LATENT -> IMAGE and back
  kontext.py        CONDITIONING, IMAGE -> CONDITIONING with a reference
  inpaint.py        CONDITIONING, IMAGE, MASK -> CONDITIONING of a Fill model; borders; the result put back
  control.py        CONDITIONING, IMAGE -> CONDITIONING with a control image; edges
  contact_sheet.py  IMAGEs -> one IMAGE to compare them
  widgets.py        inputs as INPUT_TYPES lists them
  wires.py          what travels between nodes, checked and converted to what flux_core takes
  conditioning_wires.py   the same for CONDITIONING
  model_files.py    files and folders in a loader's list, and the path of a name in it
  run_report.py     progress, seconds per step, the sampler's report as text
  memory_advice.py  what to do when memory is full
  host.py           what a host does for the nodes: one Protocol
  host_embedded*    the embedded editor's side of it
  host_comfy*       ComfyUI's side of it

Only the files host_* know a host, and only host.py chooses one. Node ids never change; titles may.
"""

from . import (
    compile,
    conditioning,
    contact_sheet,
    control,
    inpaint,
    kontext,
    latent,
    loader,
    lora,
    noise,
    sampler,
    schedule,
    solver,
    step_cache,
    vae,
)

NODES = (
    *loader.NODES,
    *lora.NODES,
    *conditioning.NODES,
    *latent.NODES,
    *noise.NODES,
    *schedule.NODES,
    *solver.NODES,
    *step_cache.NODES,
    *compile.NODES,
    *sampler.NODES,
    *vae.NODES,
    *kontext.NODES,
    *inpaint.NODES,
    *control.NODES,
    *contact_sheet.NODES,
)

NODE_CLASS_MAPPINGS = {node.NODE_ID: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.NODE_ID: node.TITLE for node in NODES}

__all__ = ["NODES", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
