"""Training the miniature's text encoders, a T5 and a CLIP text model of FLUX.1's kinds, on its captions.

Both learn, before any picture is drawn, to say what a caption says: from T5's tokens and from CLIP's pooled
state a linear map must name each attribute of the scene, or that the caption leaves it open. The transformer
is then trained on their finished outputs, and so does not have to discover language through noise.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..conditioning import TextEncoders
from .checkpoint import ProgressLine, write_safetensors, write_text
from .scenes import ATTRIBUTES, Scene, caption

TXT_LENGTH = 20
CLIP_LENGTH = 32
WIDTH = 128
PAD, END, START = "<pad>", "</s>", "<s>"


def make_tokenizer(seed: int = 0) -> Tokenizer:
    """Byte-level BPE over lower-cased text: the world's words are one token each, other text is bytes."""
    rng = random.Random(seed)
    words = [caption(Scene.random(rng).told(rng), rng) for _ in range(5000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def with_marks(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A copy of the tokenizer that puts its marks around the text, as in "<s> $A </s>"."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    marks = [(mark, copy.token_to_id(mark)) for mark in (START, END) if mark in template]
    copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return copy


def make_encoders(seed: int = 0) -> TextEncoders:
    """Untrained miniature encoders."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    vocabulary = tokenizer.get_vocab_size()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            num_layers=2,
            num_heads=4,
            d_kv=32,
            d_ff=256,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=WIDTH // 64,
            intermediate_size=256,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.token_to_id(START),
            eos_token_id=tokenizer.token_to_id(END),
            pad_token_id=None,
        )
    )
    return TextEncoders(
        t5, with_marks(tokenizer, "$A </s>"), clip, with_marks(tokenizer, "<s> $A </s>"), TXT_LENGTH
    )


class Reader(nn.Module):
    """Linear heads that name every attribute; class 0 means that nothing was said about it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(WIDTH, 1 + len(values)) for name, values in ATTRIBUTES.items()}
        )

    def loss(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Cross-entropy summed over attributes, and the share of states [B, WIDTH] with all of them right."""
        right = torch.ones(len(states), dtype=torch.bool)
        total = states.new_zeros(())
        for name, head in self.heads.items():
            logits = head(states)
            total = total + F.cross_entropy(logits, labels[name])
            right &= logits.argmax(dim=-1) == labels[name]
        return total, right.float().mean().item()


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class of each attribute of each scene; 0 for None."""
    table = {
        name: {None: 0, **{value: i + 1 for i, value in enumerate(values)}}
        for name, values in ATTRIBUTES.items()
    }
    return {name: torch.tensor([table[name][asdict(scene)[name]] for scene in scenes]) for name in ATTRIBUTES}


def train_text(folder: Path, steps: int, *, seed: int = 0, batch: int = 64, lr: float = 1e-3) -> TextEncoders:
    """Train both encoders for `steps` and write them, with their tokenizers, to `folder`; returns them.

    One caption in twelve is empty, so that the empty prompt has a meaning of its own.
    """
    encoders = make_encoders(seed)
    rng = random.Random(seed + 1)
    t5_reader, clip_reader = Reader(), Reader()
    for model in (encoders.t5, encoders.clip):
        model.train().requires_grad_(True)
    trained = (encoders.t5, encoders.clip, t5_reader, clip_reader)
    parameters = [parameter for module in trained for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    line = ProgressLine(steps)
    for step in range(steps):
        scenes = [Scene() if rng.random() < 1 / 12 else Scene.random(rng).told(rng) for _ in range(batch)]
        texts = [caption(scene, rng) if scene.shape else "" for scene in scenes]
        labels = labels_of(scenes)
        tokens = encoders.encode_t5(encoders.t5_ids(texts))
        t5_loss, t5_right = t5_reader.loss(tokens.mean(dim=1), labels)
        clip_loss, clip_right = clip_reader.loss(encoders.encode_clip(encoders.clip_ids(texts)), labels)
        optimizer.zero_grad()
        (t5_loss + clip_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        line.update(step + 1, f"read right: T5 {t5_right:.2f}, CLIP {clip_right:.2f}")
    for model in (encoders.t5, encoders.clip):
        model.eval().requires_grad_(False)
    save_text(encoders, folder)
    return encoders


def save_text(encoders: TextEncoders, folder: Path) -> None:
    """Write rectiflux-mini-t5 and rectiflux-mini-clip, safetensors with their tokenizers beside them."""
    t5 = dict(encoders.t5.state_dict())
    t5.pop("encoder.embed_tokens.weight", None)
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoders.clip.state_dict().items()}
    marks = json.dumps(encoders.clip.config.eos_token_id)
    write_safetensors(folder / "rectiflux-mini-t5.safetensors", t5, {"txt_length": str(encoders.txt_length)})
    write_safetensors(folder / "rectiflux-mini-clip.safetensors", clip, {"eos_token_id": marks})
    for name, tokenizer in (("t5", encoders.t5_tokenizer), ("clip", encoders.clip_tokenizer)):
        write_text(folder / f"rectiflux-mini-{name}.tokenizer.json", tokenizer.to_str(pretty=True))
