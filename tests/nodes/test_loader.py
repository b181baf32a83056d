"""What the loaders list, load and report, in the embedded host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.flux_core.backends import cpu_pack
from rectiflux.flux_core.backends.cpu_int8 import Int8Linear
from rectiflux.flux_core.backends.cpu_linear import PackedLinear
from rectiflux.flux_core.backends.fp8 import Fp8Linear
from rectiflux.flux_core.memory import limits
from rectiflux.flux_core.quant.linear import QuantizedLinear
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.nodes import NODE_CLASS_MAPPINGS, run_report
from rectiflux.nodes import host_embedded_loading as loading
from rectiflux.nodes.host import current_host
from rectiflux.nodes.host_embedded import EmbeddedHost
from rectiflux.nodes.memory_advice import advice_when_full
from safetensors import safe_open
from safetensors.torch import save_file

from . import graphs
from .model_files import all_in_one, pipeline, quantized_transformer
from .test_nodes import FILES, call, listening
from .tiny import NAMES, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def host(models: Path, tmp_path: Path) -> Any:
    """The embedded host with the tiny models and what a test adds to them."""
    folders = Folders.under(tmp_path / "data", models=(models,))
    with context.using(folders):
        yield folders


def outputs(class_type: str, **inputs: Any) -> tuple[Any, ...]:
    kind = NODE_CLASS_MAPPINGS[class_type]
    return getattr(kind(), kind.FUNCTION)(**inputs)


def image(**nodes: Any) -> torch.Tensor:
    prompt = graphs.text_to_image({**FILES, **nodes})
    return graphs.run(prompt, "decode")[0]


def model_node(name: str) -> graphs.Prompt:
    return graphs.node("RectifluxModelLoader", model_name=name, weight_dtype="auto")


# Lists


def test_lists_have_gguf_files_and_folders_that_are_models(tmp_path: Path) -> None:
    def touch(*names: str) -> None:
        for name in names:
            path = tmp_path / "models" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    touch("vae/b.safetensors", "vae/sub/a.GGUF", "vae/pickle.ckpt", "vae/notes.txt", "vae/config.json")
    touch("vae/shards/m.safetensors.index.json", "vae/shards/m-1.safetensors", "vae/shards/m-2.safetensors")
    touch("vae/plain/config.json", "vae/plain/model.safetensors", "vae/other/config.json")
    touch("vae/whole/model_index.json", "vae/whole/vae/model.safetensors", "vae/whole/more.gguf")
    touch("loras/one.safetensors", "loras/two.gguf", "loras/kept/config.json", "loras/kept/three.safetensors")
    touch("checkpoints/all.safetensors", "diffusion_models/also.safetensors")
    (tmp_path / "models" / "vae" / "sub" / "again").symlink_to(tmp_path / "models" / "vae")
    with context.using(Folders.under(tmp_path / "data", models=(tmp_path / "models",))):
        host = current_host()
        assert host.list_models("vae")[:5] == ["b.safetensors", "plain", "shards", "sub/a.GGUF", "whole"]
        assert all(name.startswith("rectiflux-mini") for name in host.list_models("vae")[5:])
        assert host.list_models("loras")[:2] == ["kept/three.safetensors", "one.safetensors"]
        assert not any(name.endswith(".gguf") for name in host.list_models("loras"))
        assert host.list_models("checkpoints")[:2] == ["all.safetensors", "also.safetensors"]
        assert host.model_path("vae", "shards") == tmp_path / "models" / "vae" / "shards"
        assert host.model_path("checkpoints", "also.safetensors").parent.name == "diffusion_models"
        inside = tmp_path / "models" / "vae" / "plain" / "model.safetensors"
        assert host.model_path("vae", "plain/model.safetensors") == inside, "a name that was saved before"
        for folder, name in (("vae", "other"), ("vae", "sub"), ("vae", "."), ("loras", "kept")):
            with pytest.raises(FileNotFoundError, match=f"in models/{folder}"):
                host.model_path(folder, name)


FIELDS = {
    "RectifluxModelLoader": ["model_name"],
    "RectifluxTextEncoderLoader": ["clip_name", "t5_name"],
    "RectifluxVAELoader": ["vae_name"],
    "RectifluxCheckpointLoader": ["checkpoint_name"],
}


@pytest.mark.parametrize("node", FIELDS)
def test_names_are_checked_before_a_run(host: Folders, node: str) -> None:
    check = NODE_CLASS_MAPPINGS[node].VALIDATE_INPUTS
    known = {"clip_name": NAMES["clip"], "t5_name": NAMES["t5"], "vae_name": NAMES["vae"]}
    good = {field: known.get(field, NAMES["diffusion_models"]) for field in FIELDS[node]}
    assert check(**good) is True
    for field in FIELDS[node]:
        assert check(**{**good, field: None}) is True, "a name that comes over a wire"
        assert check(**{**good, field: "old.ckpt"}).startswith(f"{field}: 'old.ckpt' is a pickle")
        assert check(**{**good, field: "gone.gguf"}).startswith(f"{field}: 'gone.gguf' is not in its list")


# Formats


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packing, which sums in another order: for models that must agree bit by bit."""
    monkeypatch.setattr(loading, "pack_weights", lambda network, on_progress: 0)


@pytest.mark.parametrize("form", ["fp8 e4m3fn", "scale_weight", "int8 by rows", "NF4", "Q8_0", "Q4_K"])
def test_a_quantized_model_gives_the_image_of_its_dequantized_weights(
    host: Folders, models: Path, form: str, unpacked: None
) -> None:
    name, dense = quantized_transformer(models, form)
    assert name in current_host().list_models("diffusion_models")
    model = call("RectifluxModelLoader", model_name=name, weight_dtype="auto")
    assert any(isinstance(layer, QuantizedLinear) for layer in model.network.modules())
    shown = image(model=model_node(name))
    assert torch.equal(shown, image(model=model_node(dense)))
    assert shown.std() > 0.08 and not torch.equal(shown, image())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system alone pages")
@pytest.mark.parametrize("form", [None, "Q4_K"])
def test_a_streamed_model_gives_the_same_image(
    host: Folders, models: Path, monkeypatch: pytest.MonkeyPatch, form: str | None, unpacked: None
) -> None:
    name = NAMES["diffusion_models"] if form is None else quantized_transformer(models, form)[0]
    expected = image(model=model_node(name))
    choices: list[str] = []
    monkeypatch.setattr(loading, "limit_of", lambda choice, device: choices.append(choice) or 0)
    streamed = model_node(name)
    streamed["inputs"]["memory_limit"] = "1 GB"
    assert torch.equal(image(model=streamed), expected)
    model = call("RectifluxModelLoader", model_name=name, weight_dtype="auto")
    assert choices == ["1 GB", "auto"], "auto in a workflow that was saved before the widget existed"
    assert model.network.streaming is not None


META = EmbeddedHost(torch.device("meta"))
"""The meta device stands in for a GPU."""


@pytest.mark.parametrize("fits", [True, False])
def test_text_encoders_run_where_they_fit(models: Path, monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda device: (10 << 30) if fits else (1 << 30))
    clip = META.load_text_encoders(*(models / "text_encoders" / NAMES[kind] for kind in ("clip", "t5")))
    devices = {p.device.type for part in (clip.t5, clip.clip) for p in part.parameters()}
    assert devices == {"meta" if fits else "cpu"}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("has_16_bit_matmul", [True, False])
def test_encoders_run_in_float32_on_a_cpu_without_16_bit_matmul(
    models: Path, monkeypatch: pytest.MonkeyPatch, has_16_bit_matmul: bool, on_gpu: bool
) -> None:
    """Also those that do not fit on a GPU; what they compute is the same to rounding."""
    texts = models / "text_encoders"
    for kind in ("clip", "t5"):
        with safe_open(texts / NAMES[kind], "pt") as file:
            half = {name: file.get_tensor(name).half() for name in file.keys()}  # no dict
            save_file(half, texts / f"half-{kind}.safetensors", file.metadata())
        tokenizer = NAMES[kind].replace(".safetensors", ".tokenizer.json")
        (texts / f"half-{kind}.tokenizer.json").write_bytes((texts / tokenizer).read_bytes())
    monkeypatch.setattr(loading, "can_pack", lambda device, dtype: has_16_bit_matmul)
    monkeypatch.setattr(loading, "fits", lambda model, device: False)
    host = META if on_gpu else EmbeddedHost(torch.device("cpu"))
    clip = host.load_text_encoders(texts / "half-clip.safetensors", texts / "half-t5.safetensors")
    dtype = torch.float16 if has_16_bit_matmul else torch.float32
    assert {p.dtype for part in (clip.t5, clip.clip) for p in part.parameters()} == {dtype}
    whole = current_host().load_text_encoders(texts / NAMES["clip"], texts / NAMES["t5"])
    found, expected = clip.encode(["a red star"]), whole.encode(["a red star"])
    torch.testing.assert_close(found.txt, expected.txt, rtol=0, atol=0.02)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=0.02)


def test_a_full_gpu_is_reported_with_the_widget() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 2 GiB; lower memory_limit") as caught:
        with advice_when_full():
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nSee the documentation")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [all_in_one, pipeline])
def test_a_checkpoint_is_its_parts(host: Folders, models: Path, write: Any) -> None:
    """The same image as with the loaders for each part, with the tiny tokenizers."""
    name = write(models)
    assert name in current_host().list_models("checkpoints")
    prompt = graphs.text_to_image(FILES)
    expected = graphs.run(prompt, "decode")[0]
    prompt["all"] = graphs.node("RectifluxCheckpointLoader", checkpoint_name=name, weight_dtype="auto")
    for node in prompt.values():
        for field, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in ("model", "clip", "vae"):
                node["inputs"][field] = ["all", ("model", "clip", "vae").index(value[0])]
    assert torch.equal(graphs.run(prompt, "decode")[0], expected)


def test_a_file_of_one_part_is_refused_as_a_checkpoint(host: Folders) -> None:
    with pytest.raises(ValueError, match="tiny.safetensors is a FLUX.1 transformer"):
        call("RectifluxCheckpointLoader", checkpoint_name=NAMES["diffusion_models"], weight_dtype="auto")


# What they report


def test_the_line_about_a_file(host: Folders, models: Path) -> None:
    name, _ = quantized_transformer(models, "Q4_K")
    variant = "FLUX.1 [schnell] in small (hidden size 256, 2 + 2 blocks)"
    _, about = outputs("RectifluxModelLoader", model_name=name, weight_dtype="auto")
    assert about.startswith(f"{variant}, GGUF Q4_K, ") and about.endswith(" million parameters")
    for checkpoint in (all_in_one(models), pipeline(models)):
        *_, about = outputs("RectifluxCheckpointLoader", checkpoint_name=checkpoint, weight_dtype="auto")
        assert about.startswith(f"{variant}, fp32, ")
    _, about = outputs("RectifluxTextEncoderLoader", clip_name=NAMES["clip"], t5_name=NAMES["t5"])
    clip, t5 = about.splitlines()
    assert clip.startswith("a CLIP text encoder, fp32, ") and t5.startswith("a T5 text encoder, fp32, ")
    assert outputs("RectifluxVAELoader", vae_name=NAMES["vae"])[1].startswith("a VAE, fp32, ")


def test_the_line_is_about_the_part_that_was_taken(host: Folders, models: Path) -> None:
    """Of a pipeline in the folder of another kind."""
    (models / "vae" / "whole").symlink_to(models / "checkpoints" / pipeline(models))
    assert outputs("RectifluxVAELoader", vae_name="whole")[1].startswith("a VAE, fp32, ")


@pytest.mark.parametrize("node", FIELDS)
def test_loading_is_shown(host: Folders, models: Path, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr(run_report, "SHOWN_FROM", 1)
    known = {"clip_name": NAMES["clip"], "t5_name": NAMES["t5"], "vae_name": NAMES["vae"]}
    known |= {"checkpoint_name": all_in_one(models), "model_name": NAMES["diffusion_models"]}
    settings = {field: known[field] for field in FIELDS[node]}
    if node in ("RectifluxModelLoader", "RectifluxCheckpointLoader"):
        settings["weight_dtype"] = "auto"
    run, events = listening()
    with context.running(run):
        call(node, **settings)
    loads = 3 if node == "RectifluxCheckpointLoader" else 1
    loads += "model_name" in settings or "checkpoint_name" in settings  # packing the transformer
    percents = [value for what, value, total in events if what == "progress" and total == 100]
    assert len(percents) == len(events) and percents.count(100) == loads
    ends = [i + 1 for i, percent in enumerate(percents) if percent == 100]
    for start, stop in zip([0, *ends], ends, strict=False):
        assert percents[start:stop] == sorted(set(percents[start:stop]))


def test_a_load_can_be_interrupted(host: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "SHOWN_FROM", 1)
    run, _ = listening(stop=True)
    with context.running(run), pytest.raises(context.Interrupted):
        call("RectifluxModelLoader", model_name=NAMES["diffusion_models"], weight_dtype="auto")


def test_progress_calls_once_per_percent_and_not_for_small_loads() -> None:
    events: list[tuple[int, int]] = []
    report = run_report.in_percent(lambda value, total: events.append((value, total)))
    for total in (0, 1, run_report.SHOWN_FROM - 1):
        report(total, total)
    assert events == []
    for done in (1, 2, 3, 999, 1000, 2000):
        report(done << 20, 2000 << 20)
    assert events == [(0, 100), (49, 100), (50, 100), (100, 100)]


def test_a_quantized_model_takes_loras(host: Folders, models: Path) -> None:
    """The image is that of the dequantized model with the same LoRA."""
    name, dense = quantized_transformer(models, "Q8_0")
    shown = []
    for file in (name, dense):
        prompt = graphs.text_to_image({**FILES, "model": model_node(file)})
        inputs = {"lora_name": NAMES["loras"], "strength_model": 0.7, "strength_clip": 0.7, "blocks": ""}
        prompt["lora"] = graphs.node("RectifluxLora", model=["model", 0], **inputs)
        prompt["sample"]["inputs"]["model"] = ["lora", 0]
        shown.append(graphs.run(prompt, "decode")[0])
    assert torch.allclose(*shown, atol=1e-5)
    assert not torch.allclose(shown[0], image(model=model_node(name)), atol=1e-2)


def test_broken_files_in_a_list_stay_one_sentence(host: Folders, models: Path) -> None:
    (models / "diffusion_models" / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    save_file({"x": torch.zeros(2)}, models / "diffusion_models" / "other.safetensors")
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        call("RectifluxModelLoader", model_name="broken.gguf", weight_dtype="auto")
    with pytest.raises(ValueError, match="other.safetensors"):
        call("RectifluxModelLoader", model_name="other.safetensors", weight_dtype="auto")


# Packing and int8, on a CPU


def test_a_model_that_fits_is_packed_and_gives_the_same_image(
    host: Folders, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, the rounding of float32; one that does not fit stays mapped from its file."""
    monkeypatch.setattr(cpu_pack, "packed_sizes", lambda dtype: (1 << 16, float("inf")))
    name = quantized_transformer(models, "Q8_0")[1]  # wide enough to be packed then, and dense
    load = {"model_name": name, "weight_dtype": "fp32"}
    packed = call("RectifluxModelLoader", **load)
    assert sum(isinstance(layer, PackedLinear) for layer in packed.network.modules()) > 5
    shown = image(model=model_node(name))
    monkeypatch.setattr(loading, "fits", lambda model, device: False)
    plain = call("RectifluxModelLoader", **load)
    assert not any(isinstance(layer, PackedLinear) for layer in plain.network.modules())
    torch.testing.assert_close(image(model=model_node(name)), shown, rtol=0, atol=1e-5)


def test_int8_quantizes_the_blocks(host: Folders, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = quantized_transformer(models, "Q8_0")[1]
    network = call("RectifluxModelLoader", model_name=name, weight_dtype="int8").network
    blocks = [*network.double_blocks, *network.single_blocks]
    count = sum(isinstance(layer, Int8Linear) for block in blocks for layer in block.modules())
    assert count == 8 * len(network.double_blocks) + 2 * len(network.single_blocks)
    assert not isinstance(network.img_in, Int8Linear)
    node = model_node(name)
    node["inputs"]["weight_dtype"] = "int8"
    exact, shown = image(model=model_node(name)), image(model=node)
    assert 0 < (exact - shown).abs().mean() < 0.02
    monkeypatch.setattr(loading, "limit_of", lambda choice, device: 1 << 10)
    with pytest.raises(ValueError, match="raise memory_limit"):
        call("RectifluxModelLoader", model_name=name, weight_dtype="int8")
    with pytest.raises(ValueError, match="int8 .* cuda"):
        EmbeddedHost(torch.device("cuda")).load_model(models / "diffusion_models" / name, "int8", "auto")


# fp8


def test_fp8_quantizes_the_blocks_and_modulations(
    host: Folders, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a GPU; all but the last block, and neither the first nor the last layer."""
    name = quantized_transformer(models, "Q8_0")[1]
    load = {"model_name": name, "weight_dtype": "fp8"}
    network = call("RectifluxModelLoader", **load).network
    count = sum(isinstance(layer, Fp8Linear) for layer in network.modules())
    assert count == 10 * len(network.double_blocks) + 3 * (len(network.single_blocks) - 1)
    node = model_node(name)
    node["inputs"]["weight_dtype"] = "fp8"
    exact, shown = image(model=model_node(name)), image(model=node)
    assert 0 < (exact - shown).abs().mean() < 0.05
    monkeypatch.setattr(loading, "limit_of", lambda choice, device: 1 << 10)
    with pytest.raises(ValueError, match="raise memory_limit"):
        call("RectifluxModelLoader", **load)


@pytest.mark.parametrize(("limit", "place"), [(None, "cuda"), (1 << 40, "cuda"), (1 << 10, None)])
def test_on_a_gpu_fp8_is_quantized_there_or_streamed(
    models: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, place: str | None
) -> None:
    calls: list[Any] = []
    cuda = torch.device("cuda")
    monkeypatch.setattr(loading, "limit_of", lambda choice, device: limit)
    monkeypatch.setattr(loading, "quantize_to_fp8", lambda model, *how: calls.append(how[:2]))
    monkeypatch.setattr(loading, "stream", lambda model, *how: calls.append(how) or model)
    path = models / "diffusion_models" / quantized_transformer(models, "Q8_0")[1]
    network = EmbeddedHost(cuda).load_model(path, "fp8", "auto").network
    assert calls == [(None if place is None else cuda, None), (cuda, limit)]
    assert network.dtype == torch.bfloat16
