"""The names of models: which a host lists, and to which file a name from any workflow leads."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.host import context
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.validation import InvalidPrompt, validate
from rectiflux.nodes import NODE_CLASS_MAPPINGS
from rectiflux.nodes.host import current_host

from . import graphs
from .test_nodes import FILES, call
from .tiny import NAMES, write_models

KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "checkpoints")
SHADOW = bytes.fromhex("00051607") + bytes(4092)
Host = Callable[[Path], Folders]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The image of the tiny models and their LoRA under their own names."""
    folders = Folders.under(tmp_path_factory.mktemp("data"), models=(tiny,))
    with context.using(folders):
        return image()


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny models."""
    return Path(shutil.copytree(tiny, tmp_path / "models"))


@pytest.fixture
def host(models: Path, tmp_path: Path) -> Iterator[Folders]:
    with context.using(folders := Folders.under(tmp_path / "data", models=(models,))):
        yield folders


def prompt(
    model: Any = NAMES["diffusion_models"], lora: Any = NAMES["loras"], **loaders: Any
) -> graphs.Prompt:
    """Text to image with a LoRA."""
    made = graphs.text_to_image({**FILES, **loaders}, steps=1, cfg_scale=1.0)
    made["model"] = graphs.node("RectifluxModelLoader", model_name=model, weight_dtype="auto")
    strengths = {"strength_model": 1.0, "strength_clip": 1.0, "blocks": ""}
    made["lora"] = graphs.node("RectifluxLora", model=["model", 0], lora_name=lora, **strengths)
    made["sample"]["inputs"]["model"] = ["lora", 0]
    return made


def image(*names: Any, **loaders: Any) -> torch.Tensor:
    return graphs.run(prompt(*names, **loaders), "decode")[0]


def listed(kind: str) -> list[str]:
    """The names of one kind, without the pack's."""
    return [name for name in current_host().list_models(kind) if not name.startswith("rectiflux-mini")]


def renamed(path: Path, name: str) -> Path:
    target = path.parent / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(target)


def problem(field: str = "model_name", kind: str = "RectifluxModelLoader", **values: Any) -> str:
    """What a loader says about a name before a run."""
    answer = NODE_CLASS_MAPPINGS[kind].VALIDATE_INPUTS(**values)
    assert isinstance(answer, str) and answer.startswith(f"{field}: ") and len(answer) < 600
    assert answer.isprintable()
    return answer.removeprefix(f"{field}: ")


def test_files_that_end_in_sft(host: Folders, models: Path, expected: torch.Tensor) -> None:
    """Every ending of safetensors, and a folder of such a file; Comfy-Org/ComfyUI#4247."""
    for path in list(models.rglob("*.safetensors")):
        path.rename(path.with_suffix(".sft"))
    files = {kind: name.replace(".safetensors", ".sft") for kind, name in NAMES.items()}
    folder = models / "diffusion_models" / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copy(
        models / "diffusion_models" / files["diffusion_models"], folder / "diffusion_pytorch_model.sft"
    )
    (models / "diffusion_models" / "pickle.sft").write_bytes(b"PK\x03\x04" + bytes(100))
    assert listed("diffusion_models") == ["folder", "pickle.sft", files["diffusion_models"]]
    assert listed("text_encoders") == [files["clip"], files["t5"]]
    assert listed("vae") == [files["vae"]] and listed("loras") == [files["loras"]]
    loaders = graphs.loaders(files["diffusion_models"], files["clip"], files["t5"], files["vae"])
    for name in (files["diffusion_models"], "folder"):
        assert torch.equal(image(name, files["loras"], clip=loaders["clip"], vae=loaders["vae"]), expected)
    with pytest.raises(ValueError, match="pickle.sft is a pickle"):
        call("RectifluxModelLoader", model_name="pickle.sft", weight_dtype="auto")


def test_hidden_files_and_folders_are_no_models(host: Folders, models: Path) -> None:
    """What macOS and download programs leave; a models folder below a hidden folder works."""
    before = {kind: listed(kind) for kind in KINDS}
    for kind in KINDS:
        for name in ("._a.safetensors", "__MACOSX/._a.gguf", ".cache/hidden.safetensors", ".hidden.gguf"):
            path = models / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(SHADOW)
    pipeline = models / "vae" / "._folder"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    assert {kind: listed(kind) for kind in KINDS} == before
    (_, options) = NODE_CLASS_MAPPINGS["RectifluxTextEncoderLoader"].INPUT_TYPES()["required"]["t5_name"]
    assert options["default"] == NAMES["t5"]
    assert "hidden" in problem(model_name="._a.safetensors")
    hidden = models.rename(models.parent / ".models")
    with context.using(Folders.under(models.parent / "data", models=(hidden,))):
        assert {kind: listed(kind) for kind in KINDS} == before


def test_the_other_systems_separators(host: Folders, models: Path, expected: torch.Tensor) -> None:
    """A workflow from Windows; Comfy-Org/ComfyUI#3343."""
    renamed(models / "diffusion_models" / NAMES["diffusion_models"], "flux/mini.safetensors")
    renamed(models / "loras" / NAMES["loras"], "styles/a.safetensors")
    for separator in "/\\":
        names = (name.replace("/", separator) for name in ("flux/mini.safetensors", "styles/a.safetensors"))
        assert torch.equal(image(*names), expected)
    for name in (
        "..\\..\\x.safetensors",
        "flux\\..\\..\\x.safetensors",
        "D:x.safetensors",
        "\\x.safetensors",
    ):
        assert "must stay in its folder" in problem(model_name=name)
        with pytest.raises(ValueError, match="must stay in its folder"):
            current_host().model_path("diffusion_models", name)


@pytest.mark.skipif(os.name == "nt", reason="there a backslash separates")
def test_a_name_with_a_real_backslash(host: Folders, models: Path, expected: torch.Tensor) -> None:
    """It comes before the file that the name would mean with a slash."""
    folder = models / "diffusion_models"
    renamed(folder / NAMES["diffusion_models"], "flux\\mini.safetensors")
    (folder / "flux").mkdir()
    (folder / "flux" / "mini.safetensors").write_bytes(b"")
    assert listed("diffusion_models") == ["flux/mini.safetensors", "flux\\mini.safetensors"]
    assert torch.equal(image("flux\\mini.safetensors"), expected)


def test_accents_in_the_other_unicode_form(host: Folders, models: Path) -> None:
    """macOS may store é as two characters, a workflow has it as one, or the other way round."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        name = f"été/modèle {form}.safetensors"
        path = models / "vae" / unicodedata.normalize(form, name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert current_host().model_path("vae", unicodedata.normalize(other, name)) == path


def test_the_old_folders_come_first(host: Folders, models: Path, expected: torch.Tensor) -> None:
    """unet/ and clip/, as ComfyUI searches them; Comfy-Org/ComfyUI#4342."""
    (models / "text_encoders").rename(models / "clip")
    (models / "unet").mkdir()
    tiny = models / "diffusion_models" / NAMES["diffusion_models"]
    shutil.copy(tiny, models / "unet" / "both.safetensors")
    (models / "diffusion_models" / "both.safetensors").write_bytes(SHADOW)
    tiny.rename(models / "unet" / NAMES["diffusion_models"])
    assert listed("diffusion_models") == ["both.safetensors", NAMES["diffusion_models"]]
    assert listed("checkpoints") == listed("diffusion_models")
    assert listed("text_encoders") == [NAMES["clip"], NAMES["t5"]]
    for name in ("both.safetensors", NAMES["diffusion_models"]):
        assert torch.equal(image(name), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is Unicode")
def test_a_name_that_is_not_utf8(host: Folders, models: Path) -> None:
    folder, before = models / "diffusion_models", listed("diffusion_models")
    for name in (b"bad\xff.safetensors", b"dir\xff/a.safetensors"):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / NAMES["diffusion_models"], path)
    assert listed("diffusion_models") == before
    for name in ("bad\udcff.safetensors", "dir\udcff/a.safetensors"):
        sentence = problem(model_name=name)
        assert "name must be valid Unicode" in sentence
        assert "damaged" not in sentence and "download" not in sentence
        with pytest.raises(ValueError) as caught:
            call("RectifluxModelLoader", model_name=name, weight_dtype="auto")
        str(caught.value).encode()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is Unicode")
def test_a_models_folder_whose_name_is_not_utf8_leaves_the_others(tiny: Path, tmp_path: Path) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
    shutil.copytree(tiny, bad)
    with context.using(Folders.under(tmp_path / "data", models=(bad, tiny))):
        assert listed("vae") == [NAMES["vae"]]
        assert call("RectifluxVAELoader", vae_name=NAMES["vae"]) is not None


def test_links_are_followed_and_broken_ones_are_not_listed(
    host: Folders, models: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    folder = models / "diffusion_models"
    disk = tmp_path / "disk"
    disk.mkdir()
    (folder / NAMES["diffusion_models"]).rename(disk / "big.safetensors")
    (folder / "link.safetensors").symlink_to(disk / "big.safetensors")
    (folder / "disk").symlink_to(disk)
    (folder / "gone.safetensors").symlink_to("nowhere.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    assert listed("diffusion_models") == ["disk/big.safetensors", "link.safetensors"]
    for name in listed("diffusion_models"):
        assert torch.equal(image(name), expected)
    for name in ("gone.safetensors", "loop.safetensors", "pipe.safetensors"):
        assert "is not in its list" in problem(model_name=name)


def test_everything_that_is_listed_is_found(host: Folders, models: Path) -> None:
    for name in (
        "a b (1).safetensors",
        "模型🦊.GGUF",
        "модель/ä.sft",
        "D:x.safetensors",
        "x\ny.sft",
        "...sft",
    ):
        path = models / "vae" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert {"a b (1).safetensors", "模型🦊.GGUF", "модель/ä.sft"} <= set(listed("vae"))
    for kind in KINDS:
        for name in current_host().list_models(kind):
            assert current_host().path_error(kind, name) is None, name
            assert current_host().model_path(kind, name).exists()


@pytest.mark.parametrize(
    "value", [5, 1.5, True, {}, {"a": 1}, "", "x" * 300, "x/" * 3000, "a\nb" * 500, None]
)
def test_a_name_that_is_none_is_refused_in_a_sentence(host: Folders, value: Any) -> None:
    """By the check before a run, and by the node itself, where the name comes over a wire."""
    registry = Registry.of_pack(host)
    made = {**prompt(value), "save": graphs.node("SaveImage", images=["decode", 0], filename_prefix="x")}
    with pytest.raises(InvalidPrompt) as refused:
        validate(made, registry)
    (sentence,) = refused.value.sentences()
    assert "model_name" in sentence and sentence.isprintable() and len(sentence) < 600
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call("RectifluxModelLoader", model_name=value, weight_dtype="auto")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
