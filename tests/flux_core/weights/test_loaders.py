"""Transformers and autoencoders of every format run as the dense model of the same weights, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from rectiflux.benchmarks.reference.models import (
    SPEC,
    autoencoder,
    diffusers_autoencoder,
    diffusers_state_dict,
    diffusers_transformer,
    diffusers_velocity,
    flux_transformer,
    relative_error,
    text,
)
from rectiflux.benchmarks.reference.quantized_files import (
    FORMS,
    State,
    wide_transformer,
    write_gguf,
    write_quantized_safetensors,
)
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.quant import formats as formats_module
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import assign as assign_module
from rectiflux.flux_core.weights import load_autoencoder, load_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIGMA, SIDE, LENGTH = 0.6, 4, 5


def velocity(model: FluxTransformer) -> Tensor:
    """The model's velocity for fixed tokens and a fixed prompt."""
    spec, generator = model.spec, torch.Generator().manual_seed(4)
    tokens = torch.randn(1, SIDE * SIDE // 4, spec.in_channels, generator=generator)
    prompt = text(9)
    if spec.context_in != SPEC.context_in:
        txt = torch.randn(1, LENGTH, spec.context_in, generator=generator)
        prompt = type(prompt)(txt, torch.randn(1, spec.vec_in, generator=generator), 3.5)
    with torch.no_grad():
        return model(tokens, model.prepare(prompt, [SIGMA], SIDE, SIDE), SIGMA)


def assert_equal(ours: State, expected: State) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def check_same(model: FluxTransformer, original: FluxTransformer) -> None:
    """The same weights and the same velocity, to the last bit.

    Mapped weights may be unaligned, where some processors sum in another order, so a copy of them is used.
    """
    assert model.spec == original.spec
    assert_equal(model.state_dict(), original.state_dict())
    assert torch.equal(velocity(copy.deepcopy(model)), velocity(original))


def with_weights(model: FluxTransformer, values: State) -> FluxTransformer:
    """A model of torch's own layers with these weights, in float32."""
    dense = FluxTransformer(model.spec).eval().requires_grad_(False)
    dense.load_state_dict({name: tensor.float() for name, tensor in values.items()})
    return dense


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def saved(tmp_path: Path, tensors: State, name: str = "model.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path / name


# Whole files


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("names", ["bfl", "diffusers"])
@pytest.mark.parametrize("sizes", [{}, {"guidance_embed": False, "depth": 1}, {"in_channels": 384}], ids=str)
def test_transformer(tmp_path: Path, prefix: str, names: str, sizes: dict) -> None:
    """[dev], [schnell] and Fill, whose first layer is wider than its output; no random value is drawn."""
    original = flux_transformer(**sizes)
    state = original.state_dict() if names == "bfl" else diffusers_state_dict(original)
    path = saved(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    before = torch.get_rng_state()
    model = load_transformer(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    check_same(model, original)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder(tmp_path: Path, prefix: str) -> None:
    original = autoencoder()
    tensors = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    if prefix:
        tensors["model.diffusion_model.img_in.weight"] = torch.zeros(1)
    model = load_autoencoder(saved(tmp_path, tensors))
    assert model.spec == original.spec
    assert_equal(model.state_dict(), original.state_dict())
    assert model.decoder.mid.block_1.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_quantized_safetensors(tmp_path: Path, form: str) -> None:
    original = flux_transformer(context_in=32, vec_in=64)
    path = tmp_path / "model.safetensors"
    values = write_quantized_safetensors(original.state_dict(), path, form)
    model = load_transformer(path, torch.float32)
    assert {f"{name}.weight" for name in quantized_layers(model)} == {
        name for name, tensor in values.items() if tensor.ndim == 2 and name != "img_in.weight"
    }
    assert model.dtype == torch.float32
    assert torch.equal(velocity(model), velocity(with_weights(original, values)))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf(tmp_path: Path, kind: str) -> None:
    """Under a name without an ending: the format is detected from the contents."""
    original, path = wide_transformer(), tmp_path / "model"
    values = write_gguf(original.state_dict(), path, kind)
    model = load_transformer(path, torch.float32)
    assert bool(quantized_layers(model)) == (kind not in ("F32", "F16", "BF16"))
    expected = velocity(with_weights(original, values))
    assert expected.isfinite().all() and torch.equal(velocity(model), expected)


@pytest.mark.parametrize("form", ["scale_weight", "NF4", "SCB", "GGUF Q5_0", "GGUF Q8_0"])
def test_quantized_with_diffusers_names(tmp_path: Path, form: str) -> None:
    """q, k, v and the MLP are quantized separately and concatenated; the last modulation's halves swap."""
    state = {
        n: t.contiguous() for n, t in diffusers_state_dict(flux_transformer(context_in=32, vec_in=64)).items()
    }
    path, kind = tmp_path / "model.safetensors", form.removeprefix("GGUF ")
    write = write_quantized_safetensors if kind == form else write_gguf
    dense = load_transformer(saved(tmp_path, write(state, path, kind), "dense.safetensors"), torch.float32)
    assert not quantized_layers(dense)
    model = load_transformer(path, torch.float32)
    fused = {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"}
    assert fused <= quantized_layers(model).keys()
    assert torch.equal(velocity(model), velocity(dense))


@pytest.mark.parametrize("shard", ["10GB", "200KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["transformer", "pipeline"])
@pytest.mark.parametrize("guidance", [True, False])
def test_a_folder_saved_by_diffusers(tmp_path: Path, shard: str, pipeline: bool, guidance: bool) -> None:
    """Gives diffusers' velocity, to 1e-5 in float32."""
    theirs = diffusers_transformer(flux_transformer(guidance_embed=guidance))
    folder = tmp_path / "transformer" if pipeline else tmp_path
    theirs.save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "200KB")
    model = load_transformer(tmp_path)
    reference = FluxTransformer2DModel.from_pretrained(folder).eval()
    prompt = text(9, guidance=3.5 if guidance else None)
    tokens = torch.randn(1, SIDE * SIDE // 4, 64, generator=torch.Generator().manual_seed(4))
    expected = diffusers_velocity(reference, tokens, prompt, SIGMA, SIDE, SIDE)
    assert relative_error(velocity(model), expected) < 1e-5


def test_the_plain_name_precedes_variants_in_a_folder(tmp_path: Path) -> None:
    saved(tmp_path, diffusers_state_dict(flux_transformer(1)), "diffusion_pytorch_model.fp16.safetensors")
    saved(tmp_path, diffusers_state_dict(flux_transformer(0)), "diffusion_pytorch_model.safetensors")
    check_same(load_transformer(tmp_path), flux_transformer(0))


@pytest.mark.parametrize("folder", ["", "vae"])
def test_a_vae_saved_by_diffusers(tmp_path: Path, folder: str) -> None:
    original = autoencoder()
    diffusers_autoencoder(original).save_pretrained(tmp_path / folder)
    model = load_autoencoder(tmp_path)
    assert_equal(model.state_dict(), original.state_dict())
    reference = AutoencoderKL.from_pretrained(tmp_path / folder).eval()
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latent = reference.encode(image).latent_dist.mean
        assert relative_error(model.encode(image), latent) < 1e-5
        assert relative_error(model.decode(latent), reference.decode(latent).sample) < 1e-5


def test_names_of_the_vae_s_attention_before_diffusers_0_15(tmp_path: Path) -> None:
    original = autoencoder()
    state = diffusers_autoencoder(original).state_dict()
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, before in old.items():
        state = {name.replace(new, before): tensor for name, tensor in state.items()}
    assert_equal(load_autoencoder(saved(tmp_path, state)).state_dict(), original.state_dict())


@pytest.mark.parametrize("described_by", ["scale_weight", "metadata"])
def test_a_scaled_fp8_transformer_in_an_all_in_one_file(tmp_path: Path, described_by: str) -> None:
    """Its scales and its metadata have the prefix, too."""
    original, vae = flux_transformer(context_in=32, vec_in=64), autoencoder()
    values = write_quantized_safetensors(original.state_dict(), tmp_path / "t.safetensors", "scale_weight")
    whole = {f"model.diffusion_model.{n}": t for n, t in load_file(tmp_path / "t.safetensors").items()}
    whole |= {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    metadata = {}
    if described_by == "metadata":
        whole = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in whole.items()}
        scaled = [name.removesuffix(".weight_scale") for name in whole if name.endswith(".weight_scale")]
        layers = {name: {"format": "float8_e4m3fn"} for name in scaled}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = tmp_path / "all.safetensors"
    save_file(whole, path, metadata)
    expected = velocity(with_weights(original, values))
    assert torch.equal(velocity(load_transformer(path, torch.float32)), expected)
    assert_equal(load_autoencoder(path).state_dict(), vae.state_dict())


# Memory and dtypes


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_a_large_file_is_computed_in_another_dtype_without_a_copy(
    tmp_path: Path, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights stay mapped, in the file's dtype, and the velocity is that of the converted model."""
    original = flux_transformer()
    state = original.state_dict() if names == "bfl" else diffusers_state_dict(original)
    path = saved(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()})
    eager = load_transformer(path, torch.float32)
    assert not quantized_layers(eager)
    monkeypatch.setattr(assign_module, "MAX_COPIED", 0)
    model = load_transformer(path, torch.float32)
    layers = quantized_layers(model)
    assert len(layers) == sum(isinstance(layer, nn.Linear) for layer in eager.modules())
    assert {t.dtype for layer in layers.values() for t in layer.buffers()} == {torch.bfloat16}
    assert torch.equal(velocity(model), velocity(eager))
    unchanged = load_transformer(path)
    assert len(quantized_layers(unchanged)) == (0 if names == "bfl" else 2 * 2 + 3 + 1)


@pytest.mark.parametrize("form", [None, "fp8 e5m2"])
def test_weights_are_the_mapped_file(tmp_path: Path, form: str | None) -> None:
    """A byte changed on disk changes in the loaded parameter or quantized layer."""
    path = tmp_path / "f.safetensors"
    state = flux_transformer(context_in=32, vec_in=64).state_dict()
    saved(tmp_path, state, path.name) if form is None else write_quantized_safetensors(state, path, form)
    layer = load_transformer(path, torch.float32).txt_in
    assert isinstance(layer, QuantizedLinear) == (form is not None)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    offset = json.loads(path.read_bytes()[8 : 8 + header])["txt_in.weight"]["data_offsets"][0]
    value = torch.tensor(7.0) if form is None else torch.tensor(7.0).to(torch.float8_e5m2).view(torch.uint8)
    with path.open("r+b") as file:
        file.seek(8 + header + offset)
        file.write(value.numpy().tobytes())
    weight = layer.dense_weight(torch.float32) if isinstance(layer, QuantizedLinear) else layer.weight
    assert weight[0, 0] == 7.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_the_file_s_or_the_one_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path, {name: t.to(dtype) for name, t in flux_transformer().state_dict().items()})
    assert {p.dtype for p in load_transformer(path).parameters()} == {dtype}
    assert {p.dtype for p in load_transformer(path, torch.float32).parameters()} == {torch.float32}


def test_mixed_and_quantized_files_get_one_dtype(tmp_path: Path) -> None:
    """That of most parameters; fp8 and GGUF compute in bfloat16."""
    tensors = flux_transformer(context_in=32, vec_in=64).state_dict()
    mixed = {n: t if t.ndim == 1 else t.to(torch.float16) for n, t in tensors.items()}
    model = load_transformer(saved(tmp_path, mixed))
    assert {model.dtype, *(p.dtype for p in model.parameters())} == {torch.float16}
    model = load_transformer(saved(tmp_path, {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}))
    assert {model.dtype, *(p.dtype for p in model.parameters())} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.buffers()} == {torch.float8_e4m3fn}
    write_gguf(tensors, tmp_path / "q.gguf", "Q4_0")
    model = load_transformer(tmp_path / "q.gguf")
    assert model.dtype == velocity(model).dtype == torch.bfloat16
    assert model.to(torch.float32).dtype == torch.float32


def test_progress_counts_the_file_s_bytes(tmp_path: Path) -> None:
    original = flux_transformer()
    calls: list[tuple[int, int]] = []
    load_transformer(saved(tmp_path, original.state_dict()), on_progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in original.state_dict().values())
    assert {of for _, of in calls} == {total}
    done = [done for done, _ in calls]
    assert done == sorted(done) and done[-1] == total and len(done) == len(original.state_dict())


@pytest.mark.parametrize("form", ["fp8 e4m3fn", "fp8 e5m2", "scale_weight", "comfy_quant"])
def test_fp8_on_a_device_without_it(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, and no fp8 tensor is moved to such a device, Apple's for one."""
    path = tmp_path / "f.safetensors"
    write_quantized_safetensors(flux_transformer(context_in=32, vec_in=64).state_dict(), path, form)
    usual = load_transformer(path, torch.float32)
    monkeypatch.setattr(formats_module, "has_fp8", lambda device: False)
    moved, inner = [], Tensor.to

    def to(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if "device" in kwargs or any(isinstance(arg, (str, torch.device)) for arg in args):
            moved.append(tensor.dtype)
        return inner(tensor, *args, **kwargs)  # type: ignore[call-overload]  # as Tensor.to takes them

    monkeypatch.setattr(Tensor, "to", to)
    model = load_transformer(path, torch.float32)
    assert torch.uint8 in {buffer.dtype for buffer in model.buffers()}
    assert not {torch.float8_e4m3fn, torch.float8_e5m2} & {*moved}
    expected = quantized_layers(usual)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.dense_weight(torch.float32), expected[name].dense_weight(torch.float32))
    for ours, theirs in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(ours, theirs)
