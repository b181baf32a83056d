"""Every format loads, and runs as the numbers that its file stands for: the same velocity, bit for bit."""

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
from rectiflux.flux_core.quant import formats as forms_module
from rectiflux.flux_core.quant.gguf import BLOCK_TYPES
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.flux_core.weights import fill as fill_module
from rectiflux.flux_core.weights import load_autoencoder, load_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIGMA, SIDE, LENGTH = 0.6, 4, 5


def velocity(model: FluxTransformer) -> Tensor:
    """The model's answer to fixed tokens and a fixed prompt."""
    spec, generator = model.spec, torch.Generator().manual_seed(4)
    tokens = torch.randn(1, SIDE * SIDE // 4, spec.in_channels, generator=generator)
    prompt = text(9)
    if spec.context_in != SPEC.context_in:
        txt = torch.randn(1, LENGTH, spec.context_in, generator=generator)
        prompt = type(prompt)(txt, torch.randn(1, spec.vec_in, generator=generator), 3.5)
    with torch.no_grad():
        return model(tokens, model.prepare(prompt, [SIGMA], SIDE, SIDE), SIGMA)


def check_same(model: FluxTransformer, original: FluxTransformer) -> None:
    """The same numbers and the same answer, to the last bit.

    Numbers mapped from a file may begin on an odd boundary, where some processors add them in another order:
    so both answer from memory of their own.
    """
    numbers = model.state_dict()
    assert all(torch.equal(numbers[name], tensor) for name, tensor in original.state_dict().items())
    assert torch.equal(velocity(copy.deepcopy(model)), velocity(original))


def with_weights(model: FluxTransformer, numbers: State) -> FluxTransformer:
    """A model of torch's own layers with these numbers, in float32."""
    plain = FluxTransformer(model.spec).eval().requires_grad_(False)
    plain.load_state_dict({name: tensor.float() for name, tensor in numbers.items()})
    return plain


def stored_names(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_safetensors(tmp_path: Path, form: str) -> None:
    original = flux_transformer(context_in=32, vec_in=64)
    path = tmp_path / "model.safetensors"
    numbers = write_quantized_safetensors(original.state_dict(), path, form)
    model = load_transformer(path, torch.float32)
    assert {f"{n}.weight" for n in stored_names(model)} == {
        n for n, t in numbers.items() if t.ndim == 2 and n != "img_in.weight"
    }
    assert model.dtype == torch.float32
    assert torch.equal(velocity(model), velocity(with_weights(original, numbers)))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf(tmp_path: Path, kind: str) -> None:
    original = wide_transformer()
    path = tmp_path / "model"  # the format is told by the content
    numbers = write_gguf(original.state_dict(), path, kind)
    model = load_transformer(path, torch.float32)
    assert bool(stored_names(model)) == (kind not in ("F32", "F16", "BF16"))
    expected = velocity(with_weights(original, numbers))
    assert expected.isfinite().all()
    assert torch.equal(velocity(model), expected)


@pytest.mark.parametrize("form", ["scale_weight", "NF4", "SCB", "GGUF Q5_0", "GGUF Q8_0"])
def test_diffusers_names_and_quantised(tmp_path: Path, form: str) -> None:
    """q, k, v and the MLP are quantised each for itself and stand below each other; halves are swapped."""
    original = flux_transformer(context_in=32, vec_in=64)
    state = {n: t.contiguous() for n, t in diffusers_state_dict(original).items()}
    path = tmp_path / "model.safetensors"
    kind = form.removeprefix("GGUF ")
    numbers = (
        write_gguf(state, path, kind) if kind != form else write_quantized_safetensors(state, path, form)
    )
    save_file({n: t.contiguous() for n, t in numbers.items()}, tmp_path / "numbers.safetensors")
    dense = load_transformer(tmp_path / "numbers.safetensors", torch.float32)
    assert not stored_names(dense)
    model = load_transformer(path, torch.float32)
    assert {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"} <= (
        stored_names(model)
    )
    assert torch.equal(velocity(model), velocity(dense))


def test_diffusers_single_file_is_ours_exactly(tmp_path: Path) -> None:
    original = flux_transformer()
    save_file(diffusers_state_dict(original), tmp_path / "f.safetensors")
    ours = load_transformer(tmp_path / "f.safetensors").state_dict()
    assert ours.keys() == original.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("shard", ["10GB", "200KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["transformer", "pipeline"])
@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_folder_agrees_with_diffusers(
    tmp_path: Path, shard: str, pipeline: bool, guidance: bool
) -> None:
    """What diffusers saves gives diffusers' velocity, to 1e-5 in float32."""
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


def test_bfloat16_in_a_folder_has_the_plain_name_first(tmp_path: Path) -> None:
    save_file(
        diffusers_state_dict(flux_transformer(1)), tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    )
    save_file(diffusers_state_dict(flux_transformer(0)), tmp_path / "diffusion_pytorch_model.safetensors")
    check_same(load_transformer(tmp_path), flux_transformer(0))


@pytest.mark.parametrize("folder", ["", "vae"])
def test_diffusers_vae_agrees_with_diffusers(tmp_path: Path, folder: str) -> None:
    original = autoencoder()
    diffusers_autoencoder(original).save_pretrained(tmp_path / folder)
    model = load_autoencoder(tmp_path)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in original.state_dict().items())
    reference = AutoencoderKL.from_pretrained(tmp_path / folder).eval()
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latent = reference.encode(image).latent_dist.mean
        assert relative_error(model.encode(image), latent) < 1e-5
        assert relative_error(model.decode(latent), reference.decode(latent).sample) < 1e-5


def test_older_names_of_the_vaes_attention(tmp_path: Path) -> None:
    """As files from before diffusers 0.15 have them."""
    original = autoencoder()
    state = diffusers_autoencoder(original).state_dict()
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, before in old.items():
        state = {name.replace(new, before): tensor for name, tensor in state.items()}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "vae.safetensors")
    model = load_autoencoder(tmp_path / "vae.safetensors")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in original.state_dict().items())


def test_one_checkpoint_holds_them_all(tmp_path: Path) -> None:
    """With an fp8 transformer, whose marker and metadata carry the prefix too."""
    original, vae = flux_transformer(context_in=32, vec_in=64), autoencoder()
    numbers = write_quantized_safetensors(original.state_dict(), tmp_path / "t.safetensors", "scale_weight")
    scaled = {f"model.diffusion_model.{n}": t for n, t in load_file(tmp_path / "t.safetensors").items()}
    whole = {**scaled, **{f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}}
    save_file(whole, tmp_path / "all.safetensors")
    expected = velocity(with_weights(original, numbers))
    assert torch.equal(velocity(load_transformer(tmp_path / "all.safetensors", torch.float32)), expected)
    assert torch.equal(
        load_autoencoder(tmp_path / "all.safetensors").state_dict()["decoder.conv_in.weight"],
        vae.state_dict()["decoder.conv_in.weight"],
    )
    renamed = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in whole.items()}
    layers = {
        n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in renamed if "weight_scale" in n
    }
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(renamed, tmp_path / "new.safetensors", metadata)
    assert torch.equal(velocity(load_transformer(tmp_path / "new.safetensors", torch.float32)), expected)


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_a_large_file_is_computed_in_another_dtype_without_a_copy(
    tmp_path: Path, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights stay mapped, in the file's dtype, and the velocity is that of the converted model."""
    original = flux_transformer()
    state = original.state_dict() if names == "bfl" else diffusers_state_dict(original)
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_file(half, tmp_path / "f.safetensors")
    eager = load_transformer(tmp_path / "f.safetensors", torch.float32)
    assert not stored_names(eager)
    monkeypatch.setattr(fill_module, "COPIED", 0)
    model = load_transformer(tmp_path / "f.safetensors", torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == sum(isinstance(layer, nn.Linear) for layer in eager.modules())
    assert {tensor.dtype for layer in layers for tensor in layer.buffers()} == {torch.bfloat16}
    assert torch.equal(velocity(model), velocity(eager))
    unchanged = load_transformer(tmp_path / "f.safetensors")
    assert len(stored_names(unchanged)) == (0 if names == "bfl" else 2 * 2 + 3 + 1)


def test_quantised_files_are_computed_in_bfloat16_unless_told(tmp_path: Path) -> None:
    write_gguf(flux_transformer(context_in=32, vec_in=64).state_dict(), tmp_path / "q.gguf", "Q4_0")
    model = load_transformer(tmp_path / "q.gguf")
    assert model.dtype == torch.bfloat16
    assert velocity(model).dtype == torch.bfloat16
    assert model.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("inputs", [384, 128])
@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_fill_canny_and_depth_read_more_than_they_write(tmp_path: Path, inputs: int, names: str) -> None:
    """The first layer is wide, the velocity is a latent's."""
    original = flux_transformer(in_channels=inputs)
    save_file(
        original.state_dict() if names == "bfl" else diffusers_state_dict(original),
        tmp_path / "f.safetensors",
    )
    model = load_transformer(tmp_path / "f.safetensors")
    assert (model.spec.in_channels, model.spec.out_channels) == (inputs, 64)
    check_same(model, original)


def test_progress_counts_the_files_bytes(tmp_path: Path) -> None:
    original = flux_transformer()
    save_file(original.state_dict(), tmp_path / "f.safetensors")
    heard: list[tuple[int, int]] = []
    load_transformer(tmp_path / "f.safetensors", on_progress=lambda done, total: heard.append((done, total)))
    total = sum(tensor.nbytes for tensor in original.state_dict().values())
    assert {of for _, of in heard} == {total}
    assert heard[-1][0] == total
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert len(heard) == len(original.state_dict())


def test_stored_weights_alias_the_mapped_file(tmp_path: Path) -> None:
    """A byte changed on the disk is changed in the layer."""
    original = flux_transformer(context_in=32, vec_in=64)
    path = tmp_path / "f.safetensors"
    write_quantized_safetensors(original.state_dict(), path, "fp8 e5m2")
    layer = load_transformer(path, torch.float32).txt_in
    assert isinstance(layer, QuantizedLinear)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    offset = json.loads(path.read_bytes()[8 : 8 + header])["txt_in.weight"]["data_offsets"][0]
    with path.open("r+b") as file:
        file.seek(8 + header + offset)
        file.write(torch.tensor(7.0).to(torch.float8_e5m2).view(torch.uint8).numpy().tobytes())
    assert layer.dense_weight(torch.float32)[0, 0] == 7.0


@pytest.mark.parametrize("form", ["fp8 e4m3fn", "fp8 e5m2", "scale_weight", "comfy_quant"])
def test_fp8_on_a_device_without_it(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, and not a tensor in fp8 is brought to such a device, Apple's for one."""
    path = tmp_path / "f.safetensors"
    write_quantized_safetensors(flux_transformer(context_in=32, vec_in=64).state_dict(), path, form)
    usual = load_transformer(path, torch.float32)
    monkeypatch.setattr(forms_module, "has_fp8", lambda device: False)
    moved, inner = [], Tensor.to

    def to(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if "device" in kwargs or any(isinstance(arg, (str, torch.device)) for arg in args):
            moved.append(tensor.dtype)
        return inner(tensor, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "to", to)
    model = load_transformer(path, torch.float32)
    assert torch.uint8 in moved and not {torch.float8_e4m3fn, torch.float8_e5m2} & {*moved}
    found = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer, other in zip(
        found, (m for m in usual.modules() if isinstance(m, QuantizedLinear)), strict=True
    ):
        assert torch.equal(layer.dense_weight(torch.float32), other.dense_weight(torch.float32))
    for ours, theirs in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(ours, theirs)
