"""Training the miniature's text encoders, a T5 and a CLIP text model of FLUX.1's kinds, on its captions.

Both are trained before the transformer: from T5's tokens and from CLIP's pooled state linear probes must
predict every attribute that the caption states (`LABELS`; "a star right of a circle" has the circle on the
left), or that it is unspecified. The transformer is then trained on the frozen encoders' outputs, and so does
not have to learn language from noisy images.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.train.checkpoint import write_safetensors, write_text
from ..flux_core.train.progress import ProgressLine
from .caption import caption
from .scene import BACKGROUNDS, COLORS, PLACES, SHAPES, Item, Scene, random_scene, with_stated_attributes

TXT_LENGTH = 32
CLIP_LENGTH = 40
WIDTH = 192
LAYERS = 3
PAD, END, START = "<pad>", "</s>", "<s>"


@cache
def make_tokenizer(seed: int = 0) -> Tokenizer:
    """Byte-level BPE over lower-cased text: words of captions are one token each, other text is bytes.

    Training it takes seconds, so it is cached; callers that change it take a copy, as `with_special_tokens`.
    """
    rng = random.Random(seed)
    words = [random_caption(rng)[1] for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def with_special_tokens(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A copy of the tokenizer that adds special tokens around the text, as in "<s> $A </s>"."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    tokens = [(token, copy.token_to_id(token)) for token in (START, END) if token in template]
    copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
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
            num_layers=LAYERS,
            num_heads=WIDTH // 32,
            d_kv=32,
            d_ff=2 * WIDTH,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 64,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.token_to_id(START),
            eos_token_id=tokenizer.token_to_id(END),
            pad_token_id=None,
        )
    )
    return TextEncoders(
        t5,
        with_special_tokens(tokenizer, "$A </s>"),
        clip,
        with_special_tokens(tokenizer, "<s> $A </s>"),
        TXT_LENGTH,
    )


OBJECT: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": ("small", "large"),
}
LABELS: dict[str, tuple[str, ...]] = {
    "kind": ("single", "pair", "2", "3", "4"),
    **{f"first {name}": values for name, values in OBJECT.items()},
    **{f"second {name}": values for name, values in OBJECT.items()},
    "axis": ("across", "up and down"),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "shadow": ("none",),
    "without": tuple(COLORS),
}
"""Values of each attribute that a caption may state; of two objects the first is the left or upper one."""


def caption_labels(scene: Scene) -> dict[str, str | None]:
    """The value of each of LABELS in a scene of stated attributes; None where it is unspecified."""
    items = scene.items
    if scene.relation in ("right", "below"):
        items = items[::-1]
    first = items[0] if items else Item()
    second = items[1] if scene.kind == "pair" else Item()
    axis = {"left": "across", "right": "across", "above": "up and down", "below": "up and down"}
    return {
        "kind": {"empty": None, "count": str(len(items))}.get(scene.kind, scene.kind),
        **{f"first {name}": getattr(first, name) for name in OBJECT},
        **{f"second {name}": getattr(second, name) for name in OBJECT},
        "axis": axis[scene.relation] if scene.relation else None,
        "place": scene.place,
        "background": scene.background,
        "shadow": None if scene.shadow else "none",
        "without": scene.without,
    }


def random_caption(rng: random.Random) -> tuple[Scene, str]:
    """A scene of stated attributes and its caption; one in twenty is empty, as unguided prompts are."""
    if rng.random() < 0.05:
        return Scene(), ""
    scene = with_stated_attributes(random_scene(rng), rng)
    return scene, caption(scene, rng)


class LabelProbe(nn.Module):
    """Linear probes that predict every label; class 0 stands for unspecified.

    Each attends to the tokens with a query of its own, as the transformer's attention will.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, 1 + len(v)) for name, v in LABELS.items()})
        self.queries = nn.Parameter(torch.randn(len(LABELS), WIDTH))

    def loss(self, tokens: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Cross-entropy summed over labels, and the share of texts [B, L, WIDTH] with all of them correct."""
        correct = torch.ones(len(tokens), dtype=torch.bool)
        total = tokens.new_zeros(())
        attention = torch.softmax(tokens @ self.queries.T / WIDTH**0.5, dim=1)
        states = attention.mT @ tokens
        for i, (name, head) in enumerate(self.heads.items()):
            logits = head(states[:, i])
            total = total + F.cross_entropy(logits, labels[name])
            correct &= logits.argmax(dim=-1) == labels[name]
        return total, correct.float().mean().item()


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class [B] of each label for scenes of stated attributes; 0 where it is unspecified."""
    labels = [caption_labels(scene) for scene in scenes]
    table = {name: {None: 0, **{v: i + 1 for i, v in enumerate(values)}} for name, values in LABELS.items()}
    return {name: torch.tensor([table[name][one[name]] for one in labels]) for name in LABELS}


def train_text(folder: Path, steps: int, *, seed: int = 0, batch: int = 64, lr: float = 1e-3) -> TextEncoders:
    """Train both encoders for `steps` and write them, with their tokenizers, to `folder`; returns them."""
    encoders = make_encoders(seed)
    rng = random.Random(seed + 1)
    t5_probe, clip_probe = LabelProbe(), LabelProbe()
    for model in (encoders.t5, encoders.clip):
        model.train().requires_grad_(True)
    trained = (encoders.t5, encoders.clip, t5_probe, clip_probe)
    parameters = [parameter for module in trained for parameter in module.parameters()]
    # T5's only information on positions, which must grow far from its small initial values
    bias = [p for name, p in encoders.t5.named_parameters() if "relative_attention_bias" in name]
    rest = [p for p in parameters if all(p is not q for q in bias)]
    groups = [{"params": rest, "lr": lr}, {"params": bias, "lr": 20 * lr}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, 20 * lr], total_steps=steps, pct_start=0.1)
    line = ProgressLine(steps)
    for step in range(steps):
        scenes, texts = zip(*(random_caption(rng) for _ in range(batch)), strict=True)
        labels = labels_of(list(scenes))
        tokens = encoders.encode_t5(encoders.t5_ids(list(texts)))
        t5_loss, t5_correct = t5_probe.loss(tokens, labels)
        pooled = encoders.encode_clip(encoders.clip_ids(list(texts)))
        clip_loss, clip_correct = clip_probe.loss(pooled[:, None], labels)
        optimizer.zero_grad()
        (t5_loss + clip_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        line.update(step + 1, f"correct labels: T5 {t5_correct:.2f}, CLIP {clip_correct:.2f}")
    for model in (encoders.t5, encoders.clip):
        model.eval().requires_grad_(False)
    save_text(encoders, folder)
    return encoders


def save_text(encoders: TextEncoders, folder: Path) -> None:
    """Write rectiflux-mini-t5 and rectiflux-mini-clip, safetensors with their tokenizers beside them."""
    t5 = dict(encoders.t5.state_dict())
    t5.pop("encoder.embed_tokens.weight", None)
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoders.clip.state_dict().items()}
    eos = json.dumps(encoders.clip.config.eos_token_id)
    write_safetensors(folder / "rectiflux-mini-t5.safetensors", t5, {"txt_length": str(encoders.txt_length)})
    write_safetensors(folder / "rectiflux-mini-clip.safetensors", clip, {"eos_token_id": eos})
    for name, tokenizer in (("t5", encoders.t5_tokenizer), ("clip", encoders.clip_tokenizer)):
        write_text(folder / f"rectiflux-mini-{name}.tokenizer.json", tokenizer.to_str(pretty=True))
