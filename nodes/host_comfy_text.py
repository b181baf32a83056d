"""ComfyUI's CLIP for FLUX.1: with its own text encoders where it can read the files, else with ours.

Its own read plain and fp8 files of CLIP-L and T5-XXL, and are offloaded layer by layer. Ours read every size
and format (GGUF, NF4), and files with their own tokenizers. Our text nodes read a prompt themselves, so that
both give the embedded editor's tokens.
What is relied on, as of ComfyUI 0.33: comfy/sd.py CLIP, load_clip and load_text_encoder_state_dicts, and the
tokenizers' folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..flux_core.model.prompts import PromptReader, as_unicode, fit, reading_notices, syntax_notices
from ..flux_core.model.spec import FLUX_SCHNELL
from ..flux_core.model.text_encoders import NO_PADDING, T5_LENGTH
from ..flux_core.weights import Checkpoint, ModelKind, Part, Source
from ..flux_core.weights import load_text_encoders as core_load_text_encoders
from ..flux_core.weights.kinds import expect
from ..flux_core.weights.weight_file import WeightFile
from .conditioning_wires import Entries
from .host_comfy_encoders import PromptTokens, TextModule
from .host_comfy_hooks import scheduling
from .host_comfy_network import ComfyNetwork
from .host_comfy_quant import follow_patches, make_patchable
from .run_report import in_percent

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
        if management.is_device_cpu(management.text_encoder_device()):
            dtype = torch.float32
        encoders = core_load_text_encoders(
            clip_checkpoint, t5_checkpoint, dtype, tokenizer_folders=_tokenizers(), on_progress=progress()
        )
        wrapped = TextModule(encoders, dtype, notice)
        wrapped.disable_offload = make_patchable(
            wrapped
        )  # ComfyUI then takes the plain patcher, as for a MODEL
        return wrapped.to(management.text_encoder_offload_device())

    target = SimpleNamespace(params={}, clip=module, tokenizer=lambda **_: None)
    # on a device that nothing runs on: else it loads its patcher, which is replaced below
    clip = comfy.sd.CLIP(target, model_options={"initial_device": torch.device("meta")})
    clip.tokenizer = PromptTokens(clip.cond_stage_model.encoders)
    if not clip.patcher.is_dynamic():
        clip.patcher = _whole_patcher(clip.patcher)
    follow_patches(clip.patcher)
    return clip


def _whole_patcher(patcher: Any) -> Any:
    """A patcher that loads all or nothing, with the settings of the one that comfy.sd.CLIP created."""
    other = whole(scheduling(type(patcher)))(
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


def progress() -> Callable[[int, int], None]:
    """A callback for (done, total) that shows percents at the running node."""
    import comfy.utils

    return in_percent(comfy.utils.ProgressBar(100).update_absolute)


def t5_length(model: Any) -> int:
    """The number of T5 tokens that a FLUX.1 MODEL, ours or a stock loader's, was trained with."""
    config = model.model.model_config.unet_config
    channels = config["in_channels"] * ComfyNetwork.patch_size**2
    return replace(FLUX_SCHNELL, in_channels=channels, guidance_embed=config["guidance_embed"]).txt_length


@dataclass(frozen=True)
class Readers:
    """How a CLIP reads prompts for T5 and CLIP-L: at most so many tokens, T5's padded with `t5_pad`."""

    t5: PromptReader
    clip: PromptReader
    t5_limit: int
    clip_limit: int
    t5_pad: int


def encode_text(
    clip: Any, prompt: str, clip_prompt: str, guidance: float | None, length: int | None, weights: str
) -> Entries:
    """A CONDITIONING by any CLIP of FLUX.1, ours or a stock loader's."""
    tokens = clip.tokenize(as_unicode(clip_prompt))
    if "l" not in tokens or "t5xxl" not in tokens:
        raise TypeError(
            f"FLUX.1 needs CLIP-L and T5, this CLIP has {', '.join(map(str, tokens)) or 'neither'}; "
            "connect Load FLUX Text Encoders"
        )
    readers = readers_of(clip.tokenizer)
    t5, clip_l = readers.t5.read(prompt, weights), readers.clip.read(clip_prompt, weights)
    size = _t5_size(t5.needed, length, readers.t5_limit, clip.tokenizer_options)
    notices = syntax_notices([prompt, clip_prompt], weights)
    notices += reading_notices((t5, clip_l), (size, readers.clip_limit))
    if notices:
        notice("\n".join(notices))
    for name, reading, limit, filler in (
        ("t5xxl", t5, size, readers.t5_pad),
        ("l", clip_l, readers.clip_limit, clip_l.end[-1]),
    ):
        row = reading.rows(None if reading is t5 else limit)[0]
        tokens[name] = [fit([token[:2] for token in row], limit, (filler, 1.0))]
    extra = {} if guidance is None else {"guidance": guidance}
    return clip.encode_from_tokens_scheduled(tokens, add_dict=extra)


def readers_of(tokenizer: Any) -> Readers:
    """The readers of a CLIP's tokenizer, ours or ComfyUI's. Raises TypeError for another one."""
    if isinstance(tokenizer, PromptTokens):
        own = tokenizer.encoders
        return Readers(own.t5_reader, own.clip_reader, own.txt_length, own.clip_length, own.t5_pad)
    try:
        t5, clip = tokenizer.t5xxl, tokenizer.clip_l
        readers = _stock_reader("T5", t5), _stock_reader("CLIP", clip)
        return Readers(*readers, T5_LENGTH, clip.max_length, t5.pad_token)
    except AttributeError as error:
        raise TypeError(
            f"a prompt is read by ComfyUI's FluxTokenizer, this CLIP has {type(tokenizer).__name__}; "
            "connect Load FLUX Text Encoders"
        ) from error


def _stock_reader(encoder: str, tokenizer: Any) -> PromptReader:
    """A reader by ComfyUI's SDTokenizer, whose own method would parse weights and embeddings."""
    library = tokenizer.tokenizer
    if getattr(library, "backend_tokenizer", None) is not None:
        return PromptReader.of(encoder, library.backend_tokenizer)
    first, marks = tokenizer.tokens_start, library("")["input_ids"]  # Python's own, before transformers 5
    return PromptReader(
        encoder, lambda text: (library(text)["input_ids"][first:-1], []), marks[:first], marks[first:]
    )


def _t5_size(needed: int, length: int | None, limit: int, options: dict[str, Any]) -> int:
    """The number of T5 tokens of a prompt; by default the encoder's, or what T5TokenizerOptions states."""
    if length is None and "t5xxl_min_length" in options:
        length = max(needed + options.get("t5xxl_min_padding", 0), options["t5xxl_min_length"])
    if length is None:
        return limit
    return min(needed if length == NO_PADDING else length, limit)


def notice(text: str) -> None:
    """Show a sentence at the running node."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
