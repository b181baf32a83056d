"""ComfyUI's side of the nodes: MODEL, CLIP and VAE are ComfyUI's own objects around our networks.

What is done is in host_comfy_loading.py, host_comfy_text.py, host_comfy_vae.py, host_comfy_lora.py and
host_comfy_sampling.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..flux_core.backends.compile import check
from ..flux_core.sampling.solver import Solver
from ..flux_core.sampling.step_cache import Caching
from ..flux_core.weights import Source
from . import host_comfy_loading as loading
from . import host_comfy_lora as lora
from . import host_comfy_sampling as sampling
from . import host_comfy_text as text
from . import host_comfy_vae as vaes
from .conditioning_wires import Entries
from .host import Host
from .host_comfy_network import CACHING, RUNNER, ComfyNetwork
from .host_comfy_quant import BlockRunner
from .memory_advice import advice_when_full
from .model_files import names_in
from .wires import SamplerInputs


class ComfyHost(Host):
    """Hands the nodes' requests to ComfyUI, which moves models, samples, tiles and shows progress."""

    # Files

    def model_folders(self, name: str) -> list[Path]:
        """ComfyUI's folders of one kind; its own lists leave out GGUF files and folders."""
        import folder_paths

        return [Path(root) for root in folder_paths.get_folder_paths(name)]

    def list_models(self, folder: str) -> list[str]:
        """With the system's separators, as in ComfyUI's own lists and in the workflows saved there."""
        return [str(path) for path in names_in(self.model_roots(folder), folder)]

    # Loading

    def load_model(self, source: Source, weight_dtype: str, memory_limit: str) -> Any:
        return loading.load_model(source, weight_dtype, memory_limit)

    def load_text_encoders(self, clip: Source, t5: Source) -> Any:
        return text.load_text_encoders(clip, t5)

    def load_vae(self, source: Source) -> Any:
        return vaes.load_vae(source)

    # Changing a model: the one received stays as it was

    def add_lora(
        self, model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float, blocks: str
    ) -> tuple[Any, Any, str]:
        return lora.add_lora(model, clip, path, strength_model, strength_clip, blocks)

    def with_caching(self, model: Any, caching: Caching) -> Any:
        _check_network(model, "Step Cache", "EasyCache")
        clone = model.clone()
        clone.model_options["transformer_options"][CACHING] = caching
        return clone

    def with_compiling(self, model: Any, mode: str) -> Any:
        """Without ComfyUI's dynamic loading, as ComfyUI's own TorchCompileModel."""
        _check_network(model, "Compile FLUX", "TorchCompileModel")
        check(model.load_device, mode)
        clone = model.clone(disable_dynamic=True)
        clone.model_options["transformer_options"][RUNNER] = BlockRunner(mode)
        return clone

    # Running

    def t5_length(self, model: Any) -> int:
        return text.t5_length(model)

    def encode_text(
        self,
        clip: Any,
        prompt: str,
        clip_prompt: str,
        guidance: float | None,
        length: int | None,
        weights: str,
    ) -> Entries:
        return text.encode_text(clip, prompt, clip_prompt, guidance, length, weights)

    def make_sampler(self, solver: Solver) -> Any:
        return sampling.make_sampler(solver)

    def sample(self, inputs: SamplerInputs) -> tuple[Tensor, str]:
        with advice_when_full():
            return sampling.sample(inputs)

    def decode(self, vae: Any, raw_latent: Tensor) -> Tensor:
        vaes.check_vae(vae)
        return vae.decode(raw_latent)

    def encode(self, vae: Any, image: Tensor) -> Tensor:
        vaes.check_vae(vae)
        return vae.encode(image)


def _check_network(model: Any, node: str, stock: str) -> None:
    """Raise TypeError unless the MODEL is ours; `stock` is ComfyUI's node of that kind for all others."""
    if not isinstance(model.model.diffusion_model, ComfyNetwork):
        raise TypeError(
            f"{node} needs a MODEL from Load FLUX Model, got one from another loader; connect Load FLUX "
            f"Model, or use ComfyUI's {stock}"
        )
