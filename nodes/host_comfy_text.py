"""ComfyUI's CLIP for FLUX.1: with its own text encoders where it can read the files, else with ours.

Its own read plain and fp8 files of CLIP-L and T5-XXL, support prompt weights and embeddings, and are
offloaded layer by layer. Ours read every size and format (GGUF, NF4), and files with their own tokenizers.
What is relied on, as of ComfyUI 0.33: comfy/sd.py CLIP, load_clip and load_text_encoder_state_dicts, and the
tokenizers' folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..flux_core.model.spec import FLUX_SCHNELL
from ..flux_core.weights import Checkpoint, ModelKind, Part, Source
from ..flux_core.weights import load_text_encoders as core_load_text_encoders
from ..flux_core.weights.kinds import expect
from ..flux_core.weights.weight_file import WeightFile
from .host_comfy_network import ComfyNetwork, PromptTokens, TextModule
from .host_comfy_quant import follow_patches, make_patchable
from .run_report import in_percent
from .wires import Entries

T5_PAD, T5_END = 0, 1
"""T5's ids of padding and of the end of a text."""

KNOWN_TO_COMFY = {
    "text_model.embeddings.token_embedding.weight": (49408, 768),
    "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
}
"""A name and a shape by which ComfyUI's loader detects CLIP-L and T5-XXL, the only two that it supports."""

BUILT_BY_COMFY = {
    "text_model.embeddings.token_embedding.weight": (49408, 768),
    "text_model.embeddings.position_embedding.weight": (77, 768),
    "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_model.encoder.layers.12.mlp.fc1.weight": None,
    "shared.weight": (32128, 4096),
    "encoder.embed_tokens.weight": (32128, 4096),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
    "encoder.block.24.layer.0.SelfAttention.q.weight": None,
}
"""Shapes of what ComfyUI's loader builds, whatever the file's are; None is a layer that it does not build."""

UNKNOWN_TO_COMFY = ("SCB", "bitsandbytes__nf4", "bitsandbytes__fp4")
"""Last parts of names that ComfyUI's loader does not support: int8 and 4-bit codes of bitsandbytes."""


def load_text_encoders(clip: Source, t5: Source) -> Any:
    """A comfy.sd.CLIP around two files, folders or checkpoints (both may be one)."""
    clip, t5 = Checkpoint.open(clip), Checkpoint.open(t5)
    files = clip.part(Part.CLIP), t5.part(Part.T5)
    for checkpoint, part, kind in ((clip, Part.CLIP, ModelKind.CLIP), (t5, Part.T5, ModelKind.T5)):
        weights = checkpoint.weights(part)
        expect(weights.kind, kind, weights.name)
    own_tokenizers = any(file.paths[0].with_suffix(".tokenizer.json").is_file() for file in files)
    if own_tokenizers or not all(comfy_reads(file) for file in files):
        return _with_our_encoders(clip, t5)
    return _with_comfy_encoders(*files)


def comfy_reads(file: WeightFile) -> bool:
    """Whether ComfyUI's own loader supports the encoder and its format."""
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    if not any(shapes.get(name) == shape for name, shape in KNOWN_TO_COMFY.items()):
        return False
    if any(shapes.get(name, shape) != shape for name, shape in BUILT_BY_COMFY.items()):
        return False
    if file.format != "safetensors" or (file.prefix and "_quantization_metadata" in file.metadata):
        return False  # the metadata of a checkpoint names its layers by the names in the checkpoint
    return not any(name.rsplit(".", 1)[-1] in UNKNOWN_TO_COMFY for name in file.tensors)


def _with_comfy_encoders(clip: WeightFile, t5: WeightFile) -> Any:
    import comfy.sd
    import comfy.utils
    import folder_paths

    embeddings = folder_paths.get_folder_paths("embeddings")
    if all(len(file.paths) == 1 and not file.prefix for file in (clip, t5)):
        paths = [str(file.paths[0]) for file in (clip, t5)]
        return comfy.sd.load_clip(paths, embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.FLUX)
    state_dicts = [
        comfy.utils.convert_old_quants(dict(file.tensors), model_prefix="", metadata=dict(file.metadata))[0]
        for file in (clip, t5)
    ]
    return comfy.sd.load_text_encoder_state_dicts(
        state_dicts, embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.FLUX
    )


def _with_our_encoders(clip_checkpoint: Checkpoint, t5_checkpoint: Checkpoint) -> Any:
    import comfy.model_management as management
    import comfy.sd

    def module(device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]) -> TextModule:
        if management.is_device_cpu(device):
            dtype = torch.float32
        encoders = core_load_text_encoders(
            clip_checkpoint, t5_checkpoint, dtype, tokenizer_folders=_tokenizers(), on_progress=progress()
        )
        wrapped = TextModule(encoders, dtype, notice)
        wrapped.disable_offload = make_patchable(
            wrapped
        )  # ComfyUI then takes the plain patcher, as for a MODEL
        return wrapped.to(device)

    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=module, tokenizer=_tokens))
    if not clip.patcher.is_dynamic():
        clip.patcher = _whole_patcher(clip.patcher)
    follow_patches(clip.patcher)
    return clip


def _whole_patcher(patcher: Any) -> Any:
    """A patcher that loads all or nothing, with the settings of the one that comfy.sd.CLIP created."""
    other = whole(type(patcher))(
        patcher.model, patcher.load_device, patcher.offload_device, patcher.model_size()
    )
    for name in ("object_patches", "force_cast_weights", "hook_mode", "is_clip"):
        setattr(other, name, getattr(patcher, name))
    return other


def whole(kind: Any) -> Any:
    """A class of ModelPatcher that loads all of a model to the device, or leaves all of it offloaded.

    Where memory is low ComfyUI's own loads a part, and its layers copy the rest to the device when they are
    used; the layers of transformers do not.
    """

    class Whole(kind):
        def load(
            self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
        ) -> Any:
            place = device_to if full_load else self.offload_device
            return super().load(place, force_patch_weights=force_patch_weights, full_load=True)

    return Whole


def _tokenizers() -> list[Path]:
    """The folders of FLUX.1's tokenizers that come with ComfyUI."""
    import comfy.sd

    home = Path(comfy.sd.__file__).parent
    return [home / "sd1_tokenizer", home / "text_encoders" / "t5_tokenizer"]


def _tokens(embedding_directory: Any = None, tokenizer_data: Any = None) -> PromptTokens:
    return PromptTokens()


def progress() -> Callable[[int, int], None]:
    """A callback for (done, total) that shows percents at the running node."""
    import comfy.utils

    return in_percent(comfy.utils.ProgressBar(100).update_absolute)


def t5_length(model: Any) -> int:
    """The number of T5 tokens that a FLUX.1 MODEL, ours or a stock loader's, was trained with."""
    config = model.model.model_config.unet_config
    channels = config["in_channels"] * ComfyNetwork.patch_size**2
    return replace(FLUX_SCHNELL, in_channels=channels, guidance_embed=config["guidance_embed"]).txt_length


def encode_text(
    clip: Any, prompt: str, clip_prompt: str, guidance: float | None, length: int | None
) -> Entries:
    """A CONDITIONING by any CLIP of FLUX.1, ours or a stock loader's."""
    tokens, t5_tokens = clip.tokenize(clip_prompt), clip.tokenize(prompt)
    if "l" not in tokens or "t5xxl" not in t5_tokens:
        raise TypeError(
            f"FLUX.1 needs CLIP-L and T5, this CLIP has {', '.join(map(str, tokens)) or 'neither'}; "
            "connect Load FLUX Text Encoders"
        )
    tokens["t5xxl"] = t5_tokens["t5xxl"]
    if length is not None:
        ours = isinstance(tokens["t5xxl"], str)
        tokens |= {"t5_length": length} if ours else {"t5xxl": of_length(tokens["t5xxl"], length)}
    extra = {} if guidance is None else {"guidance": guidance}
    return clip.encode_from_tokens_scheduled(tokens, add_dict=extra)


def of_length(batches: list[list[tuple[Any, ...]]], length: int) -> list[list[tuple[Any, ...]]]:
    """ComfyUI's T5 tokens, (id or embedding, weight), cut or padded to `length`, their own at NO_PADDING.

    The end token stays at the end.
    """
    result = []
    for batch in batches:
        ids = [token[0] if isinstance(token[0], int) else None for token in batch]
        end = max((i for i, token in enumerate(ids) if token == T5_END), default=len(batch) - 1)
        tokens = batch[: end + 1]
        wanted = length or len(tokens)
        if len(tokens) > wanted:
            tokens = [*tokens[: wanted - 1], tokens[-1]]
        result.append(tokens + [(T5_PAD, 1.0)] * (wanted - len(tokens)))
    return result


def notice(text: str) -> None:
    """Show a sentence at the running node."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
