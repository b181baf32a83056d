"""Text encoders in every format against transformers on the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.quantized_files import (
    FORMS,
    State,
    write_gguf,
    write_quantized_safetensors,
)
from rectiflux.benchmarks.reference.text import (
    WORDS,
    clip_model,
    llama_names,
    save_text_encoders,
    t5_model,
    t5_state,
    tokenizer,
)
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import describe, load_text_encoders
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

PROMPTS = ["a red fox on green", "blue"]


def model() -> T5EncoderModel:
    """A T5 encoder all of whose widths are whole blocks, and whose feed-forward is not its width."""
    return t5_model(7, d_model=64, d_kv=16, num_heads=4, d_ff=96, num_layers=2)


def llama(state: State) -> State:
    """The state dict under llama.cpp's names."""
    renamed = llama_names(state)
    assert renamed.keys() >= {"token_embd.weight", "enc.blk.0.attn_rel_b.weight", "enc.blk.1.ffn_down.weight"}
    return renamed


def expected(numbers: State) -> torch.Tensor:
    """transformers' T5 with these numbers, on the same tokens."""
    reference = model()
    numbers = {**numbers, "encoder.embed_tokens.weight": numbers["shared.weight"]}
    reference.load_state_dict({name: tensor.float() for name, tensor in numbers.items()})
    words = tokenizer("$A </s>")
    ids = [words.encode(prompt).ids for prompt in PROMPTS]
    padded = torch.tensor([row + [0] * (512 - len(row)) for row in ids])
    with torch.no_grad():
        return reference(input_ids=padded).last_hidden_state


def encoders_of(tmp_path: Path, t5: Path):
    clip, _ = save_text_encoders(tmp_path)
    tokenizer("$A </s>").save(str(t5.with_suffix(".tokenizer.json")))
    return load_text_encoders(clip, t5, torch.float32)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t5xxl.gguf"
    numbers = write_gguf(llama(t5_state(model())), path, kind, "t5encoder")
    back = dict(zip(t5_state(model()), numbers.values(), strict=True))
    encoders = encoders_of(tmp_path, path)
    layers = [layer for layer in encoders.t5.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == (0 if kind in ("F32", "F16", "BF16") else 2 * 7)
    assert torch.equal(encoders.encode(PROMPTS).txt, expected(back))
    assert encoders.t5.shared.weight is encoders.t5.encoder.embed_tokens.weight
    assert describe(path).startswith(
        f"a T5 text encoder with llama.cpp's names, GGUF {kind.replace('F', 'fp').replace('Bfp', 'bf')}"
    )


@pytest.mark.parametrize("form", FORMS)
def test_quantised_safetensors(tmp_path: Path, form: str) -> None:
    path = tmp_path / "t5xxl.safetensors"
    numbers = write_quantized_safetensors(t5_state(model()), path, form)
    encoders = encoders_of(tmp_path, path)
    layers = [layer for layer in encoders.t5.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 2 * 7
    assert torch.equal(encoders.encode(PROMPTS).txt, expected(numbers))


def test_quantised_clip(tmp_path: Path) -> None:
    original = clip_model()
    state = {f"text_model.{name}": tensor for name, tensor in original.state_dict().items()}
    clip, t5 = save_text_encoders(tmp_path)
    numbers = write_quantized_safetensors(state, clip, "scale_weight")
    encoders = load_text_encoders(clip, t5, torch.float32)
    original.load_state_dict({name.removeprefix("text_model."): t.float() for name, t in numbers.items()})
    ids = encoders.clip_ids(PROMPTS)
    found = encoders.encode_clip(ids)
    at_last_word = original(input_ids=ids).last_hidden_state[
        torch.arange(2), (ids == len(WORDS) - 1).int().argmax(-1)
    ]
    assert encoders.clip_end == len(WORDS) - 1
    assert torch.equal(found, at_last_word)


def test_folders_of_a_pipeline(tmp_path: Path) -> None:
    """As diffusers saves one: two encoders and two tokenizers, each in a folder, T5 in shards."""
    t5, clip = model(), clip_model()
    clip.save_pretrained(tmp_path / "text_encoder")
    t5.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="40KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    for folder, template in (("tokenizer", "<s> $A </s>"), ("tokenizer_2", "$A </s>")):
        (tmp_path / folder).mkdir()
        words = tokenizer(template)
        if folder == "tokenizer":  # CLIP's end mark has a name of its own
            text = words.to_str().replace("</s>", "<|endoftext|>")
            (tmp_path / folder / "tokenizer.json").write_text(text)
        else:
            words.save(str(tmp_path / folder / "tokenizer.json"))
    encoders = load_text_encoders(tmp_path, tmp_path)
    assert encoders.txt_length == 512
    assert torch.equal(encoders.encode(PROMPTS).txt, expected(t5_state(model())))
    ids = encoders.clip_ids(PROMPTS)
    reference = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        hidden = reference(input_ids=ids).last_hidden_state
    ends = (ids == encoders.clip_end).int().argmax(-1)
    assert torch.equal(encoders.encode_clip(ids), hidden[torch.arange(2), ends])


def test_a_whole_clip_with_its_eyes(tmp_path: Path) -> None:
    """OpenAI's file has both towers; the text tower is taken."""
    text = clip_model()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    both = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=16))
    clip, t5 = save_text_encoders(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in both.state_dict().items()}
    state |= {f"text_model.{name}": tensor for name, tensor in text.state_dict().items()}
    assert any(name.startswith("vision_model.") for name in state)
    save_file(state, clip)
    encoders = load_text_encoders(clip, t5)
    assert all(torch.equal(encoders.clip.state_dict()[n], t) for n, t in text.state_dict().items())


def test_text_encoders_report_t5s_progress(tmp_path: Path) -> None:
    clip, t5 = save_text_encoders(tmp_path)
    heard: list[tuple[int, int]] = []
    load_text_encoders(clip, t5, on_progress=lambda done, total: heard.append((done, total)))
    assert heard[-1][0] == heard[-1][1] > sum(tensor.nbytes for tensor in load_file(t5).values())
