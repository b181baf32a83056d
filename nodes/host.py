"""What a host, the program that runs the nodes, does for them: one Protocol, implemented once for each host.

`EmbeddedHost` (host_embedded.py) is the editor that comes with this pack, `ComfyHost` (host_comfy.py) is
ComfyUI. Importing this file imports neither.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..flux_core.memory import LIMITS
from ..flux_core.model.text_encoders import NO_PADDING
from ..flux_core.sampling.solver import Solver
from ..flux_core.sampling.step_cache import Caching
from ..flux_core.weights import Checkpoint, Source
from . import model_files
from .conditioning_wires import Entries
from .wires import SamplerInputs

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""Data types of the weights, None for the file's own; int8 and fp8 quantize the layers that dominate the
time, and the rest is in bf16, or in fp32 on CPUs without bf16."""

MEMORY_LIMITS = tuple(LIMITS)
T5_LENGTHS: dict[str, int | None] = {"auto": None, "512": 512, "256": 256, "128": 128, "prompt": NO_PADDING}
"""Number of T5 tokens, None for the encoder's own."""


class Host(Protocol):
    """The host's side of the nodes. Methods with a body are the same in every host."""

    # Files

    def model_folders(self, name: str) -> list[Path]:
        """The host's own folders for one of ComfyUI's folder names, such as "vae"."""
        ...

    def model_roots(self, folder: str) -> list[Path]:
        """Folders that hold models of one kind: the user's, then the pack's."""
        names = model_files.folders_for(folder)
        own = [root for name in names for root in self.model_folders(name)]
        return list(dict.fromkeys([*own, *(model_files.PACK_MODELS / name for name in names)]))

    def list_models(self, folder: str) -> list[str]:
        """Names of the models of one kind, the user's before the pack's."""
        return [path.as_posix() for path in model_files.names_in(self.model_roots(folder), folder)]

    def model_path(self, folder: str, name: Any) -> Path:
        """The file or folder of a name. Raises as model_files.path_of."""
        return model_files.path_of(self.model_roots(folder), folder, name)

    def path_error(self, folder: str, name: Any) -> str | None:
        """What is wrong with a model's name, in half a sentence, or None: for VALIDATE_INPUTS."""
        return model_files.path_error(self.model_roots(folder), folder, name)

    def file_state(self, folder: str, name: str | None) -> str:
        """A text that changes when that file or folder does, empty without one: for IS_CHANGED."""
        try:
            return "" if name is None else model_files.file_state(self.model_path(folder, name))
        except (OSError, ValueError):
            return ""

    # Loading

    def load_model(self, source: Source, weight_dtype: str, memory_limit: str) -> Any:
        """A MODEL from a transformer's file, in one of WEIGHT_DTYPES, with one of MEMORY_LIMITS.

        Raises what flux_core.weights.load_transformer raises, and ValueError where int8 or fp8 cannot run.
        """
        ...

    def load_text_encoders(self, clip: Source, t5: Source) -> Any:
        """A CLIP from the files of both text encoders. Raises what flux_core's load_text_encoders raises."""
        ...

    def load_vae(self, source: Source) -> Any:
        """A VAE from an autoencoder's file. Raises what flux_core.weights.load_autoencoder raises."""
        ...

    def load_checkpoint(self, source: Source, weight_dtype: str, memory_limit: str) -> tuple[Any, Any, Any]:
        """MODEL, CLIP and VAE from an all-in-one file or a pipeline's folder. Raises what the three raise."""
        checkpoint = Checkpoint.open(source)
        model = self.load_model(checkpoint, weight_dtype, memory_limit)
        return model, self.load_text_encoders(checkpoint, checkpoint), self.load_vae(checkpoint)

    # Changing a model: the one received stays as it was

    def add_lora(
        self, model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
    ) -> tuple[Any, Any, str]:
        """MODEL and CLIP (or None) with a LoRA, and a report of which keys matched.

        Raises what flux_core.lora's read_lora and with_lora raise, and ValueError where nothing matches.
        """
        ...

    def with_caching(self, model: Any, caching: Caching) -> Any:
        """The MODEL with a step cache. Raises TypeError for a model of another loader."""
        ...

    def with_compiling(self, model: Any, mode: str) -> Any:
        """The MODEL with its blocks compiled at their first run, in one of flux_core.backends.compile.MODES.

        Raises TypeError for a model of another loader, and ValueError where torch.compile cannot work.
        """
        ...

    # Running

    def t5_length(self, model: Any) -> int:
        """The number of T5 tokens that a MODEL was trained with."""
        ...

    def encode_text(
        self,
        clip: Any,
        prompt: str,
        clip_prompt: str,
        guidance: float | None,
        length: int | None,
        weights: str,
    ) -> Entries:
        """A CONDITIONING of one prompt: T5 reads `prompt`, CLIP reads `clip_prompt`, the same in every host.

        `length` is the number of T5 tokens, at most the encoder's own, which None stands for; `weights` is
        one of flux_core.model.prompts.WEIGHTS. Raises TypeError for a CLIP of another kind.
        """
        ...

    def make_sampler(self, solver: Solver) -> Any:
        """A SAMPLER that takes the solver's steps."""
        ...

    def sample(self, inputs: SamplerInputs) -> tuple[Tensor, str]:
        """Raw latent [B, 16, h, w] on the CPU, and a report of the run.

        Raises ValueError or TypeError before the transformer runs when an input does not fit.
        """
        ...

    def decode(self, vae: Any, raw_latent: Tensor) -> Tensor:
        """An IMAGE [B, H, W, 3] from a raw latent [B, 16, h, w]. Raises TypeError for another VAE."""
        ...

    def encode(self, vae: Any, image: Tensor) -> Tensor:
        """A raw latent [B, 16, h, w] from an IMAGE [B, H, W, 3]. Raises TypeError for another VAE."""
        ...


@functools.cache
def current_host() -> Host:
    """The host of this process: ComfyUI has imported its own modules before any pack."""
    if {"comfy.model_management", "folder_paths"} <= sys.modules.keys():
        from .host_comfy import ComfyHost

        return ComfyHost()
    from .host_embedded import EmbeddedHost

    return EmbeddedHost()
