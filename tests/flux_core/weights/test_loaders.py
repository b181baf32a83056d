"""Modules from files: the file's own memory, nothing random, no second copy; and sentences for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflux.benchmarks.reference.models import autoencoder, flux_transformer
from rectiflux.benchmarks.reference.text import save_text_encoders
from rectiflux.flux_core.weights import checkpoint as source_module
from rectiflux.flux_core.weights import (
    load_autoencoder,
    load_text_encoders,
    load_transformer,
    read_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]


def saved(tmp_path: Path, tensors: State, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("sizes", [{}, {"guidance_embed": False, "depth": 1}])
def test_transformer(tmp_path: Path, prefix: str, sizes: dict) -> None:
    original = flux_transformer(**sizes)
    path = saved(tmp_path, {prefix + name: tensor for name, tensor in original.state_dict().items()})
    model = load_transformer(path)
    assert model.spec == original.spec
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert_same(model.state_dict(), original.state_dict())


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder(tmp_path: Path, prefix: str) -> None:
    original = autoencoder()
    tensors = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    if prefix:
        tensors["model.diffusion_model.img_in.weight"] = torch.zeros(1)
    model = load_autoencoder(saved(tmp_path, tensors))
    assert model.spec == original.spec
    assert_same(model.state_dict(), original.state_dict())
    assert model.decoder.mid.block_1.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def assert_same(ours: State, expected: State) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_text_encoders_out_of_one_checkpoint(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    parts = {
        "clip_l": read_state_dict(clip_path),
        "t5xxl": read_state_dict(t5_path),
    }
    whole = {
        f"text_encoders.{p}.transformer.{n}": t.clone() for p, part in parts.items() for n, t in part.items()
    }
    metadata = {"eos_token_id": "1", "txt_length": "9"}
    for name in ("clip", "t5"):
        (tmp_path / f"{name}.tokenizer.json").rename(tmp_path / f"all-{name}.tokenizer.json")
        save_file(whole, tmp_path / f"all-{name}.safetensors", metadata)
    both = load_text_encoders(tmp_path / "all-clip.safetensors", tmp_path / "all-t5.safetensors")
    assert torch.isfinite(both.encode(["a red fox"]).txt).all()
    assert both.txt_length == 9


def test_nothing_is_initialised_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is on the meta device until it gets a file's tensor, and no generator is asked."""
    paths = {
        load_transformer: saved(tmp_path, flux_transformer().state_dict(), "t.safetensors"),
        load_autoencoder: saved(tmp_path, autoencoder().state_dict(), "v.safetensors"),
    }
    clip_path, t5_path = save_text_encoders(tmp_path)
    before_filling: list[bool] = []
    original = nn.Module.load_state_dict

    def spy(self: nn.Module, *args: object, **options: object) -> object:
        before_filling.append(all(p.is_meta for p in self.parameters()))
        assert options["assign"]
        return original(self, *args, **options)

    monkeypatch.setattr(nn.Module, "load_state_dict", spy)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for load, path in paths.items():
        load(path)
    load_text_encoders(clip_path, t5_path)
    assert before_filling == [True] * 4
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_the_mapped_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy: each parameter lies at the address of the tensor that was read."""
    path = saved(tmp_path, flux_transformer().state_dict())
    addresses: dict[str, int] = {}
    original = source_module.read_state_dict

    def spy(path: Path, prefixes: tuple[str, ...]) -> State:
        read = original(path, prefixes)
        addresses.update({name: tensor.data_ptr() for name, tensor in read.items()})
        return read

    monkeypatch.setattr(source_module, "read_state_dict", spy)
    model = load_transformer(path)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


def test_t5_holds_its_embedding_once(tmp_path: Path) -> None:
    t5 = load_text_encoders(*save_text_encoders(tmp_path)).t5
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_the_files_or_the_asked_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = flux_transformer()
    path = saved(tmp_path, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    assert {p.dtype for p in load_transformer(path).parameters()} == {dtype}
    assert {p.dtype for p in load_transformer(path, torch.float32).parameters()} == {torch.float32}
    clip_path, t5_path = save_text_encoders(tmp_path, dtype)
    both = load_text_encoders(clip_path, t5_path)
    assert {p.dtype for encoder in (both.t5, both.clip) for p in encoder.parameters()} == {dtype}
    assert both.encode(["a fox"]).txt.dtype == torch.float32


def test_mixed_and_eight_bit_files_get_one_dtype(tmp_path: Path) -> None:
    """The one that most numbers have; 8-bit floats, which torch cannot multiply, compute in bfloat16."""
    tensors = flux_transformer().state_dict()
    mixed = {n: t if t.ndim == 1 else t.to(torch.float16) for n, t in tensors.items()}
    model = load_transformer(saved(tmp_path, mixed, "m.st"))
    assert {model.dtype, *(p.dtype for p in model.parameters())} == {torch.float16}
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}
    model = load_transformer(saved(tmp_path, eight, "e.st"))
    assert {model.dtype, *(p.dtype for p in model.parameters())} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.buffers()} == {torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: s.pop("single_blocks.1.linear2.bias"),
            r"lacks 1 tensor \(single_blocks.1.linear2.bias\); it is",
        ),
        (
            lambda s: [s.pop(n) for n in list(s) if n.startswith("double_blocks.1.txt")],
            r"lacks 12 tensors \(double_blocks.1.txt_mod.lin.weight, .*, \.\.\.\); it is incomplete",
        ),
        (
            lambda s: s.update({"img_in.scale_weight": torch.ones(1)}),
            r"has 1 tensor \(img_in.scale_weight\) that this model does not know; choose an unmodified model",
        ),
        (
            lambda s: s.update({"single_blocks.0.linear1.weight": torch.ones(3, 5)}),
            r"single_blocks.0.linear1.weight must be \[448, 64\] by its other tensors, got \[3, 5\]",
        ),
        (
            lambda s: s.update({"img_in.weight": torch.ones(64, 64, dtype=torch.int8)}),
            r"is quantised \(img_in.weight is torch.int8\); choose a bf16, fp16 or fp32 file",
        ),
        (lambda s: s.pop("txt_in.weight"), "it has no txt_in.weight"),
    ],
    ids=["one missing", "many missing", "unknown", "shape", "quantised", "size unknown"],
)
def test_what_does_not_fit_is_said(tmp_path: Path, damage, message: str) -> None:
    tensors = dict(flux_transformer().state_dict())
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        load_transformer(saved(tmp_path, tensors))


def test_files_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    vae = saved(tmp_path, autoencoder().state_dict(), "ae.safetensors")
    transformer = saved(tmp_path, flux_transformer().state_dict(), "flux.safetensors")
    with pytest.raises(
        ValueError, match="ae.safetensors is a VAE, not a FLUX.1 transformer; choose a FLUX.1"
    ):
        load_transformer(vae)
    with pytest.raises(ValueError, match="t5.safetensors is a T5 text encoder, not a FLUX.1 transformer"):
        load_transformer(t5_path)
    with pytest.raises(ValueError, match="clip.safetensors is a CLIP text encoder, not a VAE"):
        load_autoencoder(clip_path)
    with pytest.raises(ValueError, match="flux.safetensors is a FLUX.1 transformer, not a VAE"):
        load_autoencoder(transformer)
    with pytest.raises(ValueError, match="flux.safetensors is a FLUX.1 transformer, not a T5 text encoder"):
        load_text_encoders(clip_path, transformer)
    with pytest.raises(ValueError, match="ae.safetensors is a VAE, not a CLIP text encoder"):
        load_text_encoders(vae, t5_path)


def test_vae_of_stable_diffusion_is_refused(tmp_path: Path) -> None:
    tensors = dict(autoencoder().state_dict())
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :4]
    with pytest.raises(
        ValueError, match="is a VAE with 4 latent channels, FLUX.1's has 16; choose FLUX.1's ae"
    ):
        load_autoencoder(saved(tmp_path, tensors))


def test_tokenizers_and_metadata(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    tokenizer = tmp_path / "t5.tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text[: len(text) // 2])
    with pytest.raises(
        ValueError, match=r"t5.tokenizer.json is not a tokenizer file \(.*\); download it again"
    ):
        load_text_encoders(clip_path, t5_path)
    tokenizer.unlink()
    with pytest.raises(
        FileNotFoundError, match="t5.tokenizer.json does not exist beside t5.safetensors; put the"
    ):
        load_text_encoders(clip_path, t5_path)
    tokenizer.write_text(text)
    save_file(read_state_dict(t5_path), tmp_path / "new.safetensors", {"txt_length": "many"})
    (tmp_path / "new.safetensors").replace(t5_path)
    with pytest.raises(
        ValueError, match="txt_length in the metadata of t5.safetensors must be .*, got 'many'"
    ):
        load_text_encoders(clip_path, t5_path)


def test_a_tokenizer_of_another_encoder(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    tokenizer = tmp_path / "clip.tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"fox": 12', '"fox": 4711'))
    with pytest.raises(ValueError) as refused:
        load_text_encoders(clip_path, t5_path)
    assert str(refused.value) == (
        "clip.tokenizer.json makes 4,712 different tokens, clip.safetensors knows 13; "
        "put the tokenizer.json that belongs to this encoder there"
    )


SHAPES = [torch.tensor(1.0), torch.zeros(0), torch.zeros(0, 5), torch.zeros(7), torch.zeros(2, 3, 4)]


SIZED = {
    "flux": ["img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"],
    "vae": ["encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down.1.block.0.conv1.weight"],
    "clip": ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
}
"""Tensors whose shapes tell a model's sizes."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda tensor: str([*tensor.shape]))
def test_shapes_of_no_model_are_the_files_fault(tmp_path: Path, shape: Tensor) -> None:
    """One sentence with the file's name, and what to do."""
    clip_path, t5_path = save_text_encoders(tmp_path)
    clip, t5 = read_state_dict(clip_path), read_state_dict(t5_path)
    cases = {
        "flux": (flux_transformer().state_dict(), load_transformer, {}),
        "vae": (autoencoder().state_dict(), load_autoencoder, {}),
        "clip": (clip, lambda path: load_text_encoders(path, t5_path), {"eos_token_id": "1"}),
        "t5": (t5, lambda path: load_text_encoders(clip_path, path), {}),
    }
    for model, (tensors, load, metadata) in cases.items():
        for name in SIZED[model]:
            path = tmp_path / "x.safetensors"
            save_file({**tensors, name: shape}, path, metadata)
            with pytest.raises(ValueError, match="^x.safetensors[: ].*(; |heads must have)"):
                load(path)


def test_a_size_that_is_not_there(tmp_path: Path) -> None:
    tensors = dict(autoencoder().state_dict())
    del tensors["encoder.down.1.block.0.conv1.weight"]
    says = (
        "^model.safetensors lacks encoder.down.1.block.0.conv1.weight; it is incomplete, download it again$"
    )
    with pytest.raises(ValueError, match=says):
        load_autoencoder(saved(tmp_path, tensors))


def test_without_metadata_the_length_is_flux_dev(tmp_path: Path) -> None:
    clip_path, t5_path = save_text_encoders(tmp_path)
    save_file(read_state_dict(t5_path), tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(t5_path)
    assert load_text_encoders(clip_path, t5_path).txt_length == 512


def test_clip_as_transformers_4_wraps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the text model is an attribute of CLIPTextModel, and its parameters have that prefix."""
    import transformers

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
