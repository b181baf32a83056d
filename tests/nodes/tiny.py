"""A complete tiny FLUX with random weights, written to files: every part of the right shape, none of any use.

It stands in for trained weights wherever only the plumbing is tested. The transformer's heads have FLUX.1's
128 dimensions, so that ComfyUI's own loader takes the same file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rectiflux.flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec
from rectiflux.flux_core.model.spec import FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WORDS = (
    "a red green blue yellow circle square triangle star on the left right of small large white black".split()
)
NAMES = {
    "diffusion_models": "tiny.safetensors",
    "vae": "tiny-vae.safetensors",
    "clip": "tiny-clip.safetensors",
    "t5": "tiny-t5.safetensors",
    "loras": "tiny-lora.safetensors",
}
TXT_LENGTH, TXT_WIDTH, POOLED_WIDTH = 16, 32, 64
SPEC = FluxSpec(256, 2, 2, 2, context_in=TXT_WIDTH, vec_in=POOLED_WIDTH)
VAE_SPEC = AutoEncoderSpec(ch=16, ch_mult=(1, 2, 2, 2), num_res_blocks=1)


def random_weights(module: nn.Module, seed: int, scale: float = 0.08) -> dict[str, torch.Tensor]:
    """A state dict of the module's shapes: norm scales near 1, else normal, deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in module.state_dict().items():
        noise = scale * torch.randn(tensor.shape, generator=generator)
        is_norm = tensor.ndim == 1 and name.endswith(("scale", "weight"))
        weights[name] = 1 + noise if is_norm else noise
    return weights


def write_tokenizer(path: Path, start: str | None, end: str, filler: str | None) -> int:
    """A tokenizer of whole words at `path`; the id of its end mark."""
    special = [mark for mark in (filler, start, end, "<unk>") if mark is not None]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, vocabulary[mark]) for mark in (start, end) if mark is not None]
    template = f"{start} $A {end}" if start else f"$A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    tokenizer.save(str(path))
    return vocabulary[end]


def write_transformer(path: Path, spec: FluxSpec, metadata: dict[str, str] | None = None) -> None:
    """A transformer with random weights at `path`."""
    with torch.device("meta"):
        transformer = FluxTransformer(spec)
    save_file(random_weights(transformer, 1), path, metadata)


def lora_tensors(spec: FluxSpec = SPEC, seed: int = 5) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 in kohya's format: every linear layer of the blocks, one layer of each encoder."""
    with torch.device("meta"):
        transformer = FluxTransformer(spec)
    shapes = {
        f"lora_unet_{name.replace('.', '_')}": (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "blocks" in name
    }
    shapes["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] = (POOLED_WIDTH, POOLED_WIDTH)
    shapes["lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0"] = (64, TXT_WIDTH)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for stem, (rows, width) in shapes.items():
        tensors[f"{stem}.lora_down.weight"] = 0.1 * torch.randn(4, width, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors


def write_models(root: Path, spec: FluxSpec = SPEC, metadata: dict[str, str] | None = None) -> Path:
    """The four files, two tokenizers and a LoRA below `root`, in ComfyUI's folders; returns `root`."""
    for folder in ("diffusion_models", "vae", "text_encoders", "loras"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_transformer(root / "diffusion_models" / NAMES["diffusion_models"], spec, metadata)
    with torch.device("meta"):
        autoencoder = AutoEncoder(VAE_SPEC)
    save_file(random_weights(autoencoder, 2), root / "vae" / NAMES["vae"])
    save_file(lora_tensors(spec), root / "loras" / NAMES["loras"])
    texts = root / "text_encoders"
    write_tokenizer(texts / "tiny-t5.tokenizer.json", None, "</s>", "<pad>")
    eos = write_tokenizer(texts / "tiny-clip.tokenizer.json", "<start>", "<end>", None)
    t5 = T5Config(
        vocab_size=32,
        d_model=TXT_WIDTH,
        d_kv=16,
        num_heads=2,
        num_layers=2,
        d_ff=64,
        feed_forward_proj="gated-gelu",
    )
    clip = CLIPTextConfig(
        vocab_size=32,
        hidden_size=POOLED_WIDTH,
        num_attention_heads=1,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
    )
    with torch.device("meta"):
        t5_model, clip_model = T5EncoderModel(t5), CLIPTextModel(clip)
    t5_weights = {
        n: t for n, t in random_weights(t5_model, 3, 0.3).items() if n != "encoder.embed_tokens.weight"
    }
    save_file(t5_weights, texts / NAMES["t5"], {"txt_length": str(TXT_LENGTH)})
    save_file(random_weights(clip_model, 4, 0.3), texts / NAMES["clip"], {"eos_token_id": str(eos)})
    return root
