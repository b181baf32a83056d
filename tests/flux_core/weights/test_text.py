"""Text encoders of every format against transformers' on the same weights and tokens."""

from __future__ import annotations

import json
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
from rectiflux.flux_core.model.text_encoders import TextEncoders
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import Checkpoint, describe, load_text_encoders
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

from .refusals import refusal

PROMPTS = ["a red fox on green", "blue"]


def model() -> T5EncoderModel:
    """A T5 encoder all of whose widths are whole blocks, and whose feed-forward is not its width."""
    return t5_model(7, d_model=64, d_kv=16, num_heads=4, d_ff=96, num_layers=2)


def expected_t5(values: State) -> Tensor:
    """The hidden states of transformers' T5 with these weights, for the same tokens."""
    reference = model()
    values = {**values, "encoder.embed_tokens.weight": values["shared.weight"]}
    reference.load_state_dict({name: tensor.float() for name, tensor in values.items()})
    ids = [tokenizer("$A </s>").encode(prompt).ids for prompt in PROMPTS]
    padded = torch.tensor([row + [0] * (512 - len(row)) for row in ids])
    with torch.no_grad():
        return reference(input_ids=padded).last_hidden_state


def encoders_of(tmp_path: Path, t5: Path) -> TextEncoders:
    clip, _ = save_text_encoders(tmp_path)
    tokenizer("$A </s>").save(str(t5.with_suffix(".tokenizer.json")))
    return load_text_encoders(clip, t5, torch.float32)


def quantized_count(module: nn.Module) -> int:
    return sum(isinstance(layer, QuantizedLinear) for layer in module.modules())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_gguf_with_llama_cpp_s_names(tmp_path: Path, kind: str) -> None:
    path, renamed = tmp_path / "t5xxl.gguf", llama_names(t5_state(model()))
    assert {"token_embd.weight", "enc.blk.0.attn_rel_b.weight", "enc.blk.1.ffn_down.weight"} <= renamed.keys()
    values = write_gguf(renamed, path, kind, "t5encoder")
    encoders = encoders_of(tmp_path, path)
    assert quantized_count(encoders.t5) == (0 if kind in ("F32", "F16", "BF16") else 2 * 7)
    expected = expected_t5(dict(zip(t5_state(model()), values.values(), strict=True)))
    assert torch.equal(encoders.encode(PROMPTS).txt, expected)
    assert encoders.t5.shared.weight is encoders.t5.encoder.embed_tokens.weight
    label = kind.replace("F", "fp").replace("Bfp", "bf")
    assert describe(path).startswith(f"a T5 text encoder with llama.cpp's names, GGUF {label}")


@pytest.mark.parametrize("form", FORMS)
def test_quantized_t5(tmp_path: Path, form: str) -> None:
    path = tmp_path / "t5xxl.safetensors"
    values = write_quantized_safetensors(t5_state(model()), path, form)
    encoders = encoders_of(tmp_path, path)
    assert quantized_count(encoders.t5) == 2 * 7
    assert torch.equal(encoders.encode(PROMPTS).txt, expected_t5(values))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_a_decoder_in_gguf_is_ignored(tmp_path: Path, kind: str, architecture: str) -> None:
    """As `decoder.` and `lm_head.` in safetensors; what belongs to neither half is refused."""
    encoder = llama_names(t5_state(model()))
    decoder = {
        "dec.blk.0.attn_q.weight": torch.zeros(64, 64),
        "dec.blk.0.attn_norm.weight": torch.zeros(64),
        "dec.blk.0.attn_rel_b.weight": torch.zeros(32, 4),
        "dec.blk.0.cross_attn_q.weight": torch.zeros(64, 64),
        "dec.output_norm.weight": torch.zeros(64),
        "output.weight": torch.zeros(13, 64),
    }
    write_gguf(encoder, tmp_path / "encoder.gguf", kind, "t5encoder")
    write_gguf({**decoder, **encoder}, tmp_path / "whole.gguf", kind, architecture)
    expected = encoders_of(tmp_path, tmp_path / "encoder.gguf").encode(PROMPTS).txt
    assert torch.equal(encoders_of(tmp_path, tmp_path / "whole.gguf").encode(PROMPTS).txt, expected)
    for name in ("dec.other.weight", "pooler.weight"):
        write_gguf({**encoder, name: torch.zeros(64)}, tmp_path / "other.gguf", kind, architecture)
        assert name in refusal(lambda path: encoders_of(tmp_path, path), tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("rows", "tokens", "problem"),
    [
        (69328, 69328, None),
        (32128, 32100, None),
        (32128, 32000, None),  # a SentencePiece model's, without <extra_id_0> ...
        (69328, 32100, "has 32,100 tokens, the vocabulary of t5.safetensors 69,328; put the tokenizer.json"),
        (69328, 0, "t5.tokenizer.json does not exist beside t5.safetensors, whose vocabulary has 69,328"),
    ],
)
def test_a_larger_vocabulary_needs_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int, problem: str | None
) -> None:
    """With a shorter tokenizer, the rows beyond it would never be reached."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    clip, t5 = save_text_encoders(tmp_path)
    state = load_file(t5)
    generator = torch.Generator().manual_seed(3)
    state["shared.weight"] = torch.randn(rows, state["shared.weight"].shape[1], generator=generator)
    save_file(state, t5)
    tokenizer_file = tmp_path / "t5.tokenizer.json"
    tokenizer_file.unlink()
    if tokens:
        words = [*WORDS, *(f"word{i}" for i in range(len(WORDS), tokens))]
        tokenizer("$A </s>", words).save(str(tokenizer_file))
    if problem is not None:
        error = ValueError if tokens else FileNotFoundError
        assert problem in refusal(load_text_encoders, clip, t5, error=error)
        return
    encoders = load_text_encoders(clip, t5)
    txt = encoders.encode(["a red fox", f"a word{tokens - 1} fox"]).txt
    assert not torch.equal(txt[0], txt[1])
    assert encoders.t5_ids(["a fox"])[0, 0] == WORDS.index("a")


def test_a_bias_of_swapped_shape(tmp_path: Path) -> None:
    """T5 has 32 distance buckets; with the sides swapped it would load with other heads."""
    clip, t5 = save_text_encoders(tmp_path)
    state, name = load_file(t5), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({**state, name: state[name].T.contiguous()}, t5)
    assert "32 rows and a column for each head, got shape [2, 32]" in refusal(load_text_encoders, clip, t5)


def expected_clip(reference: CLIPTextModel, encoders: TextEncoders) -> Tensor:
    """transformers' hidden state at the end token."""
    ids = encoders.clip_ids(PROMPTS)
    with torch.no_grad():
        hidden = reference(input_ids=ids).last_hidden_state
    return hidden[torch.arange(2), (ids == encoders.clip_end).int().argmax(-1)]


def test_quantized_clip(tmp_path: Path) -> None:
    original = clip_model()
    state = {f"text_model.{name}": tensor for name, tensor in original.state_dict().items()}
    clip, t5 = save_text_encoders(tmp_path)
    values = write_quantized_safetensors(state, clip, "scale_weight")
    encoders = load_text_encoders(clip, t5, torch.float32)
    original.load_state_dict({name.removeprefix("text_model."): t.float() for name, t in values.items()})
    assert encoders.clip_end == len(WORDS) - 1
    assert torch.equal(encoders.encode_clip(encoders.clip_ids(PROMPTS)), expected_clip(original, encoders))


def test_folders_of_a_pipeline(tmp_path: Path) -> None:
    """As diffusers saves one: two encoders and two tokenizers, each in a folder, T5 in shards."""
    model().save_pretrained(tmp_path / "text_encoder_2", max_shard_size="40KB")
    clip_model().save_pretrained(tmp_path / "text_encoder")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    for folder, template in (("tokenizer", "<s> $A </s>"), ("tokenizer_2", "$A </s>")):
        text = tokenizer(template).to_str()
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(
            text.replace("</s>", "<|endoftext|>") if folder == "tokenizer" else text
        )
    checkpoint = Checkpoint.open(tmp_path)
    encoders = load_text_encoders(checkpoint, checkpoint)
    assert encoders.txt_length == 512
    assert torch.equal(encoders.encode(PROMPTS).txt, expected_t5(t5_state(model())))
    reference = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    assert torch.equal(encoders.encode_clip(encoders.clip_ids(PROMPTS)), expected_clip(reference, encoders))


def test_encoders_in_all_in_one_files(tmp_path: Path) -> None:
    clip, t5 = save_text_encoders(tmp_path)
    expected = load_text_encoders(clip, t5).encode(PROMPTS)
    whole = {f"text_encoders.clip_l.transformer.{n}": t for n, t in load_file(clip).items()}
    whole |= {f"text_encoders.t5xxl.transformer.{n}": t for n, t in load_file(t5).items()}
    for name in ("clip", "t5"):  # one tokenizer.json can be beside a file
        (tmp_path / f"{name}.tokenizer.json").rename(tmp_path / f"all-{name}.tokenizer.json")
        metadata = {"eos_token_id": str(WORDS.index("</s>")), "txt_length": "9"}
        save_file(whole, tmp_path / f"all-{name}.safetensors", metadata)
    encoders = load_text_encoders(tmp_path / "all-clip.safetensors", tmp_path / "all-t5.safetensors")
    assert encoders.txt_length == 9
    assert torch.equal(encoders.encode(PROMPTS).pooled, expected.pooled)


def test_a_clip_file_with_its_vision_tower(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_embedding_progress_and_default_length(tmp_path: Path, dtype: torch.dtype) -> None:
    """The file's dtype; T5's embedding held once; progress in T5's bytes; 512 tokens without metadata."""
    clip, t5 = save_text_encoders(tmp_path, dtype)
    save_file(load_file(t5), t5)  # without metadata
    calls: list[tuple[int, int]] = []
    before = torch.get_rng_state()
    both = load_text_encoders(clip, t5, on_progress=lambda *call: calls.append(call))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for encoder in (both.t5, both.clip) for p in encoder.parameters()} == {dtype}
    assert both.encode(["a fox"]).txt.dtype == torch.float32
    assert both.t5.shared.weight is both.t5.encoder.embed_tokens.weight
    assert calls[-1][0] == calls[-1][1] > sum(tensor.nbytes for tensor in load_file(t5).values())
    assert both.txt_length == 512


def test_broken_and_missing_tokenizers_and_metadata(tmp_path: Path) -> None:
    clip, t5 = save_text_encoders(tmp_path)
    clip_json, t5_json = tmp_path / "clip.tokenizer.json", tmp_path / "t5.tokenizer.json"
    text = clip_json.read_text()
    clip_json.write_text(text.replace('"fox": 12', '"fox": 4711'))
    message = refusal(load_text_encoders, clip, t5)
    assert "clip.tokenizer.json has 4,712 tokens" in message and "13" in message
    clip_json.write_text(text)
    text = t5_json.read_text()
    t5_json.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="t5.tokenizer.json"):
        load_text_encoders(clip, t5)
    t5_json.unlink()
    assert "t5.tokenizer.json" in refusal(load_text_encoders, clip, t5, error=FileNotFoundError)
    t5_json.write_text(text)
    save_file(load_file(t5), t5, {"txt_length": "many"})
    assert "txt_length" in refusal(load_text_encoders, clip, t5)


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_a_tokenizer_that_adds_ids_beyond_its_vocabulary(tmp_path: Path, encoder: str) -> None:
    """Those of the special tokens' template, which no look-up in the vocabulary checks."""
    files = save_text_encoders(tmp_path)
    path = tmp_path / f"{encoder}.tokenizer.json"
    contents = json.loads(path.read_text())
    marks = contents["post_processor"]["special_tokens"]
    marks["</s>" if encoder == "t5" else next(iter(marks))]["ids"] = [65536]
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"^{path.name} .* adds the token id 65,536, .* download it again$"):
        load_text_encoders(*files)


def test_clip_as_transformers_4_wraps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the text model is an attribute of CLIPTextModel, and its parameters have that prefix."""
    import transformers  # here, because it replaces its module while it is first imported

    class Wrapped(nn.Module):
        def __init__(self, config: transformers.CLIPTextConfig) -> None:
            super().__init__()
            self.config, self.text_model = config, unwrapped(config)

        @property
        def device(self) -> torch.device:
            return self.text_model.device

        def forward(self, **inputs: Tensor) -> object:
            return self.text_model(**inputs)

    unwrapped = transformers.CLIPTextModel
    files = save_text_encoders(tmp_path)
    expected = load_text_encoders(*files).encode(["a circle"]).pooled
    monkeypatch.setattr(transformers, "CLIPTextModel", Wrapped)
    encoders = load_text_encoders(*files)
    assert isinstance(encoders.clip, Wrapped)
    assert torch.equal(encoders.encode(["a circle"]).pooled, expected)
