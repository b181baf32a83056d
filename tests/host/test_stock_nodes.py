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
from rectiflux.host.stock import LoadImage, PreviewAny, PreviewImage, SaveImage, fill_in, read_picture


def test_ids_widgets_and_wires_are_comfyuis(registry: Registry, folders: Folders) -> None:
    """As nodes.py of ComfyUI 0.33 declares them."""
    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    info = registry.object_info()
    load, save, preview = (info[name] for name in ("LoadImage", "SaveImage", "PreviewImage"))
    assert load["input_order"] == {"required": ["image"]} and load["output"] == ["IMAGE", "MASK"]
    choices, options = load["input"]["required"]["image"]
    assert choices == ["a.png"] and options["image_upload"] is True
    hidden = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    assert save["input_order"]["required"] == ["images", "filename_prefix"]
    assert save["input"]["required"]["filename_prefix"][1]["default"] == "ComfyUI"
    assert preview["input_order"]["required"] == ["images"]
    for node in (save, preview):
        assert node["input"]["hidden"] == hidden and node["output_node"]
        assert (node["output"], node["output_name"]) == (["IMAGE"], ["images"])
        assert node["python_module"] == "nodes"
    assert [node["display_name"] for node in (load, save, preview)] == [
        "Load Image",
        "Save Image",
        "Preview Image",
    ]


def test_text_previews_id_and_wires_are_comfyuis(registry: Registry) -> None:
    """As comfy_extras/nodes_preview_any.py of ComfyUI 0.33 declares them."""
    info = registry.object_info()["PreviewAny"]
    assert info["input_order"] == {"required": ["source"]} and info["input"]["required"]["source"][0] == "*"
    assert (info["output"], info["output_name"], info["output_node"]) == (["STRING"], ["STRING"], True)
    assert (info["display_name"], info["category"]) == ("Preview as Text", "utilities")


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
def test_anything_is_shown_as_text(value: Any, text: str) -> None:
    """The payload that the editor's PreviewAny widget reads, and the text for the next node."""
    assert PreviewAny().main(value) == {"ui": {"text": (text,)}, "result": (text,)}


def test_a_stock_node_cannot_be_replaced(folders: Folders) -> None:
    class Impostor: ...

    registry = Registry({"SaveImage": Impostor}, {"SaveImage": "Mine"}, folders)
    assert registry["SaveImage"] is SaveImage and registry.title("SaveImage") == "Save Image"


def test_a_node_that_cannot_describe_itself_is_left_out(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            raise OSError("its folder is gone")

    info = Registry({"Broken": Broken}, {}, folders).object_info()
    assert sorted(info) == ["LoadImage", "PreviewAny", "PreviewImage", "SaveImage"]
    assert "Broken does not describe its inputs" in caplog.text


def test_a_picture_without_alpha(tmp_path: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, mask = read_picture(tmp_path / "a.png")
    assert image.dtype == mask.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(pixels)[None].float() / 255)
    assert mask.shape == (1, 64, 64) and not mask.any()


def test_transparency_comes_out_as_a_mask(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (6, 4), (10, 20, 30, 255))
    picture.putpixel((5, 0), (10, 20, 30, 0))
    picture.save(tmp_path / "a.png")
    image, mask = read_picture(tmp_path / "a.png")
    assert image.shape == (1, 4, 6, 3) and mask.shape == (1, 4, 6)
    assert mask[0, 0, 5] == 1 and mask.sum() == 1


def test_a_camera_picture_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg")[0].shape == (1, 6, 4, 3)


def test_sixteen_bits_and_animations(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[0][0, 0, 0].tolist() == pytest.approx([128 / 255] * 3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif")[0][:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="^a.png is no readable picture; save it again as PNG or JPEG$"):
        read_picture(tmp_path / "a.png")


def test_a_picture_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^there is no picture a.png any more; choose or upload one$"):
        read_picture(tmp_path / "a.png")


def test_loading_notices_a_changed_file(folders: Folders) -> None:
    with context.using(folders):
        Image.new("RGB", (4, 4)).save(folders.input / "a.png")
        before = LoadImage.IS_CHANGED("a.png")
        assert LoadImage.IS_CHANGED("a.png") == before
        Image.new("RGB", (4, 4), "red").save(folders.input / "a.png")
        assert LoadImage.IS_CHANGED("a.png") != before
        assert LoadImage().load_image("a.png")[0][0, 0, 0].tolist() == [1, 0, 0]


def test_saving_a_batch(folders: Folders) -> None:
    images = torch.tensor([-1.0, 0.5, 2.0])[:, None, None, None].expand(3, 4, 8, 3)
    with context.using(folders):
        saved = SaveImage().save_images(images, "animals/fox_%width%x%height%", {"1": {}}, {"workflow": {}})
    assert saved["result"][0] is images
    names = [(image["filename"], image["subfolder"], image["type"]) for image in saved["ui"]["images"]]
    assert names == [(f"fox_8x4_0000{number}_.png", "animals", "output") for number in (1, 2, 3)]
    colours = []
    for name, subfolder, _ in names:
        with Image.open(folders.output / subfolder / name) as picture:
            colours.append(picture.getpixel((0, 0)))
            assert json.loads(picture.text["prompt"]) == {"1": {}}
    assert colours == [(0, 0, 0), (127, 127, 127), (255, 255, 255)]


def test_a_disk_that_fills_up_amid_a_batch(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = iter([None, None, OSError(errno.ENOSPC, "no space")])

    def fsync(descriptor: int) -> None:
        if (error := next(saves)) is not None:
            raise error

    monkeypatch.setattr(files.os, "fsync", fsync)
    with context.using(folders), pytest.raises(files.SaveError) as refused:
        SaveImage().save_images(torch.zeros(4, 4, 4, 3), "fox")
    assert str(refused.value) == (
        f"the disk is full, fox.png was not saved to {folders.output}; "
        "free some space and run again (2 of 4 pictures are saved)"
    )
    assert len(list(folders.output.iterdir())) == 2


def test_what_is_no_number_is_saved_as_black(folders: Folders) -> None:
    with context.using(folders):
        (saved,) = SaveImage().save_images(torch.full((1, 4, 4, 3), torch.nan), "fox")["ui"]["images"]
    with Image.open(folders.output / saved["filename"]) as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 0)


def test_a_prefix_stays_in_the_output_folder(folders: Folders) -> None:
    with context.using(folders):
        for prefix in ("../fox", "/tmp/fox", "..\\fox"):
            with pytest.raises(
                ValueError, match="must stay in the folder output, got .*; write a name or subfolder/name"
            ):
                SaveImage().save_images(torch.zeros(1, 4, 4, 3), prefix)
        with pytest.raises(
            ValueError, match="^filename_prefix is empty; write how the pictures' names begin$"
        ):
            SaveImage().save_images(torch.zeros(1, 4, 4, 3), "")


def test_previews_go_to_temp(folders: Folders) -> None:
    with context.using(folders):
        first, second = (PreviewImage().save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"][0] for _ in "12")
    assert first["type"] == "temp" and first["filename"] != second["filename"]
    assert (folders.temp / first["filename"]).is_file() and not list(folders.output.iterdir())


def test_the_time_in_a_prefix() -> None:
    assert fill_in("%year%-%month%", 1, 1).replace("-", "").isdigit()
    assert fill_in("%unknown%", 1, 1) == "%unknown%"
