"""Text encoders: exactly transformers' values, padding as FLUX needs it, and reported truncation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.text import (
    CLIP_LENGTH,
    TXT_LENGTH,
    WORDS,
    clip_model,
    save_text_encoders,
    t5_model,
)
from rectiflux.flux_core.model.text_encoders import NO_PADDING, TextEncoders, clip_from_shapes, t5_from_shapes
from rectiflux.flux_core.weights import load_text_encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> TextEncoders:
    return load_text_encoders(*save_text_encoders(tmp_path_factory.mktemp("text")))


def ids(text: str, length: int, filler: str) -> torch.Tensor:
    words = text.split()
    return torch.tensor([[WORDS.index(word) for word in words + [filler] * (length - len(words))]])


def test_agrees_with_transformers_exactly(encoders: TextEncoders) -> None:
    """T5 has no attention mask and is padded with 0; CLIP is padded with end marks, pooled at the first."""
    text = encoders.encode(["a red circle", "blue fox on a green square"])
    t5_ids = torch.cat(
        [ids("a red circle </s>", 9, "<pad>"), ids("blue fox on a green square </s>", 9, "<pad>")]
    )
    clip_ids = torch.cat(
        [ids("<s> a red circle </s>", 7, "</s>"), ids("<s> blue fox on a green </s>", 7, "</s>")]
    )
    assert torch.equal(text.txt, t5_model()(input_ids=t5_ids).last_hidden_state)
    assert torch.equal(text.pooled, clip_model()(input_ids=clip_ids).pooler_output)
    assert text.guidance is None
    assert text.txt.shape[:2] == (2, TXT_LENGTH)


def test_pooled_is_the_state_at_the_first_end_mark(encoders: TextEncoders) -> None:
    states = clip_model()(input_ids=ids("<s> a red circle </s>", 7, "</s>")).last_hidden_state
    assert torch.equal(encoders.encode(["a red circle"]).pooled, states[:, 4])


def test_two_texts(encoders: TextEncoders) -> None:
    both = encoders.encode(["a fox"], ["red"])
    assert torch.equal(both.txt, encoders.encode(["a fox"]).txt)
    assert torch.equal(both.pooled, encoders.encode(["red"]).pooled)
    with pytest.raises(ValueError, match="got 1 and 2"):
        encoders.encode(["a"], ["a", "red"])


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "щука 狐 🦊 a", "\x00", "a \ud83e", "\udcff\udd8a a"])
def test_odd_prompts_are_prompts(encoders: TextEncoders, prompt: str) -> None:
    text = encoders.encode([prompt])
    assert torch.isfinite(text.txt).all()
    assert torch.isfinite(text.pooled).all()


def test_truncation_is_reported_with_token_counts(
    encoders: TextEncoders, caplog: pytest.LogCaptureFixture
) -> None:
    notices: list[str] = []
    long = encoders.encode(["a red fox on a blue square of green"], on_notice=notices.append)
    assert notices == [
        "the prompt is too long for T5: 10 tokens, of which it reads the first 9",
        "the prompt is too long for CLIP: 11 tokens, of which it reads the first 7",
    ]
    assert not caplog.records, "reported once"
    encoders.encode(["a red fox on a blue square of green"])
    assert [record.getMessage() for record in caplog.records] == notices
    assert torch.equal(long.txt, encoders.encode(["a red fox on a blue square of"]).txt)
    full = encoders.encode(["a red fox on a"], on_notice=lambda notice: pytest.fail(notice))
    assert torch.equal(long.pooled, full.pooled)


def test_other_lengths(encoders: TextEncoders) -> None:
    """Shorter than the encoders' own, never longer, or the prompt's: transformers' values for these ids."""
    words = "a red circle </s>"
    for requested, length in ((6, 6), (12, TXT_LENGTH), (NO_PADDING, 4)):
        txt = encoders.encode(["a red circle"], txt_length=requested).txt
        assert torch.equal(txt, t5_model()(input_ids=ids(words, length, "<pad>")).last_hidden_state)
    short = encoders.encode(["a red circle"], txt_length=3, on_notice=lambda notice: None)
    assert torch.equal(short.txt, encoders.encode(["a red"], txt_length=3).txt)


def test_no_padding_equals_masked_padding(encoders: TextEncoders) -> None:
    own = encoders.encode(["a red circle"], txt_length=NO_PADDING).txt
    padded = ids("a red circle </s>", 9, "<pad>")
    masked = t5_model()(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[:, :4]
    assert torch.allclose(own, masked, atol=1e-6)


def test_wrong_lengths_are_refused(encoders: TextEncoders) -> None:
    with pytest.raises(ValueError, match="got 2, 3"):
        encoders.encode(["a", "a red"], txt_length=NO_PADDING)
    with pytest.raises(ValueError, match="got -1"):
        encoders.encode(["a"], txt_length=-1)
    long = "a red fox on a blue square of green"
    assert encoders.encode([long], txt_length=NO_PADDING).txt.shape[1] == TXT_LENGTH


def test_token_counts(encoders: TextEncoders) -> None:
    counts = encoders.token_counts("a red fox", "fox")
    assert [(count.encoder, count.needed, count.limit) for count in counts] == [
        ("T5", 4, TXT_LENGTH),
        ("CLIP", 3, CLIP_LENGTH),
    ]


def test_sizes_of_the_encoders_of_flux() -> None:
    """Shapes as in t5xxl_fp16.safetensors and clip_l.safetensors: 24 blocks and 12 layers."""
    t5 = {
        "shared.weight": torch.empty(32128, 4096, device="meta"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.empty(
            32, 64, device="meta"
        ),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.empty(4096, 4096, device="meta"),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.empty(10240, 4096, device="meta"),
    }
    t5 |= {f"encoder.block.{i}.layer.0.layer_norm.weight": torch.empty(4096) for i in range(1, 24)}
    clip = {
        "embeddings.token_embedding.weight": torch.empty(49408, 768, device="meta"),
        "embeddings.position_embedding.weight": torch.empty(77, 768, device="meta"),
        "encoder.layers.0.mlp.fc1.weight": torch.empty(3072, 768, device="meta"),
    }
    clip |= {f"encoder.layers.{i}.layer_norm1.bias": torch.empty(768) for i in range(1, 12)}
    assert sum(p.numel() for p in t5_from_shapes(t5).parameters()) == 4_762_310_656
    assert sum(p.numel() for p in clip_from_shapes(clip).parameters()) == 123_060_480
    assert clip_from_shapes(clip).config.eos_token_id == 49407


def test_other_state_dicts_are_refused() -> None:
    with pytest.raises(ValueError, match="t5xxl"):
        t5_from_shapes({"shared.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="clip_l"):
        clip_from_shapes({"shared.weight": torch.zeros(2, 2)})


def test_swapped_files_are_refused(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    with pytest.raises(ValueError, match="clip.safetensors"):
        load_text_encoders(t5_path, clip_path)
