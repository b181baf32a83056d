"""LoadImage, SaveImage, PreviewImage and PreviewAny behave as ComfyUI's do."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.host import context, files
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.stock_nodes import (
    LoadImage,
    PreviewAny,
    PreviewImage,
    SaveImage,
    expand_prefix,
    read_image,
)


def test_ids_widgets_and_wires_are_comfyuis(registry: Registry, folders: Folders) -> None:
    """As nodes.py and comfy_extras/nodes_preview_any.py of ComfyUI 0.33 declare them."""
    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    info = registry.object_info()
    names = ("LoadImage", "SaveImage", "PreviewImage", "PreviewAny")
    load, save, preview, text = (info[name] for name in names)
    assert load["input_order"] == {"required": ["image"]} and load["output"] == ["IMAGE", "MASK"]
    choices, options = load["input"]["required"]["image"]
    assert choices == ["a.png"] and options["image_upload"] is True
    assert save["input_order"]["required"] == ["images", "filename_prefix"]
    assert save["input"]["required"]["filename_prefix"][1]["default"] == "ComfyUI"
    assert preview["input_order"]["required"] == ["images"]
    for node in (save, preview):
        assert node["input"]["hidden"] == {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
        assert (node["output"], node["output_name"], node["output_node"]) == (["IMAGE"], ["images"], True)
        assert node["python_module"] == "nodes"
    assert text["input_order"] == {"required": ["source"]} and text["input"]["required"]["source"][0] == "*"
    assert (text["output"], text["output_name"], text["output_node"]) == (["STRING"], ["STRING"], True)
    titles = [info[name]["display_name"] for name in names]
    assert titles == ["Load Image", "Save Image", "Preview Image", "Preview as Text"]


def test_a_stock_node_cannot_be_replaced_and_a_broken_node_is_left_out(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            raise OSError("its folder is missing")

    registry = Registry({"SaveImage": Broken, "Broken": Broken}, {"SaveImage": "Mine"}, folders)
    assert registry["SaveImage"] is SaveImage and registry.title("SaveImage") == "Save Image"
    assert sorted(registry.object_info()) == ["LoadImage", "PreviewAny", "PreviewImage", "SaveImage"]
    assert "INPUT_TYPES of Broken failed" in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two\nlines", "two\nlines"),
        (3, "3"),
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        (["é", {"a": 1}], '[\n    "é",\n    {\n        "a": 1\n    }\n]'),
        (torch.tensor([1.0, 2.0]), "tensor([1., 2.])"),
        ({"samples": torch.zeros(2)}, "{'samples': tensor([0., 0.])}"),
    ],
)
def test_any_value_is_shown_as_text(value: Any, text: str) -> None:
    """What the editor's PreviewAny widget reads, and the text for the next node."""
    assert PreviewAny().main(value) == {"ui": {"text": (text,)}, "result": (text,)}


def test_an_image_without_alpha(tmp_path: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert image.dtype == mask.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(pixels)[None].float() / 255)
    assert mask.shape == (1, 64, 64) and not mask.any()


def test_transparency_becomes_the_mask(tmp_path: Path) -> None:
    source = Image.new("RGBA", (6, 4), (10, 20, 30, 255))
    source.putpixel((5, 0), (10, 20, 30, 0))
    source.save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert image.shape == (1, 4, 6, 3) and mask.shape == (1, 4, 6)
    assert mask[0, 0, 5] == 1 and mask.sum() == 1


def test_exif_orientation_16_bits_and_animations(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg")[0].shape == (1, 6, 4, 3)
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0][0, 0, 0].tolist() == pytest.approx([0x8000 / 65535] * 3)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0][:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("data", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_missing_and_unreadable_images_are_named(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png (is not a readable image|no longer exists); "):
        read_image(tmp_path / "a.png")


def test_loading_notices_a_changed_file(folders: Folders) -> None:
    with context.using(folders):
        Image.new("RGB", (4, 4)).save(folders.input / "a.png")
        before = LoadImage.IS_CHANGED("a.png")
        assert LoadImage.IS_CHANGED("a.png") == before
        Image.new("RGB", (4, 4), "red").save(folders.input / "a.png")
        assert LoadImage.IS_CHANGED("a.png") != before
        assert LoadImage().load_image("a.png")[0][0, 0, 0].tolist() == [1, 0, 0]


def test_saving_a_batch(folders: Folders) -> None:
    """Values are clipped to 0..1, NaN becomes 0, and the result is truncated to 8 bits as in ComfyUI."""
    images = torch.tensor([-1.0, 0.5, 2.0, torch.nan])[:, None, None, None].expand(4, 4, 8, 3)
    with context.using(folders):
        saved = SaveImage().save_images(images, "animals/fox_%width%x%height%", {"1": {}}, {"workflow": {}})
    assert saved["result"][0] is images
    names = [(image["filename"], image["subfolder"], image["type"]) for image in saved["ui"]["images"]]
    assert names == [(f"fox_8x4_0000{index}_.png", "animals", "output") for index in (1, 2, 3, 4)]
    colors = []
    for name, subfolder, _ in names:
        with Image.open(folders.output / subfolder / name) as image:
            colors.append(image.getpixel((0, 0)))
            assert json.loads(image.text["prompt"]) == {"1": {}}
    assert colors == [(0, 0, 0), (127, 127, 127), (255, 255, 255), (0, 0, 0)]


def test_a_disk_that_fills_up_during_a_batch(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = iter([None, None, OSError(errno.ENOSPC, "no space")])

    def fsync(descriptor: int) -> None:
        if (error := next(saves)) is not None:
            raise error

    monkeypatch.setattr(files.os, "fsync", fsync)
    with (
        context.using(folders),
        pytest.raises(files.SaveError, match=r"^the disk is full, .* \(2 of 4 images are saved\)$"),
    ):
        SaveImage().save_images(torch.zeros(4, 4, 4, 3), "fox")
    assert len(list(folders.output.iterdir())) == 2


@pytest.mark.parametrize("prefix", ["../fox", "/tmp/fox", "..\\fox", ""])
def test_a_prefix_stays_in_the_output_folder(folders: Folders, prefix: str) -> None:
    with context.using(folders), pytest.raises(ValueError, match="^filename_prefix must "):
        SaveImage().save_images(torch.zeros(1, 4, 4, 3), prefix)


def test_previews_are_saved_in_temp(folders: Folders) -> None:
    with context.using(folders):
        first, second = (PreviewImage().save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"][0] for _ in "12")
    assert first["type"] == "temp" and first["filename"] != second["filename"]
    assert (folders.temp / first["filename"]).is_file() and not list(folders.output.iterdir())


def test_the_date_in_a_prefix() -> None:
    assert expand_prefix("%year%-%month%", 1, 1).replace("-", "").isdigit()
    assert expand_prefix("%unknown%", 1, 1) == "%unknown%"
