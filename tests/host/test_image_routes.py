"""Uploads, masks and /view: every door reads an image as LoadImage does."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from aiohttp import FormData
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from rectiflux.host import context, image_routes, png_file
from rectiflux.host.files import Folders
from rectiflux.host.images import MEDIA_TYPES, TRANSPOSED, decode
from rectiflux.host.stock_nodes import LoadImage

from .client import Client
from .image_fuzzer import encoded

CORNER = (0, 0, 16, 16)
RED, GREEN = (230, 20, 20), (40, 160, 60)


def upload(client: Client, data: bytes, name: str, path: str = "image", **fields: str) -> Any:
    """(status, JSON) of an upload."""
    form = FormData(quote_fields=False)
    form.add_field("image", io.BytesIO(data), filename=name, content_type="application/octet-stream")
    for key, value in fields.items():
        form.add_field(key, value)
    response = client.post(f"/api/upload/{path}", data=form)
    return response.status, response.json if response.status in (200, 400) else response.text


def view(client: Client, name: str, options: str = "", kind: str = "input") -> Image.Image:
    response = client.get(f"/api/view?filename={quote(name)}&type={kind}&{options}")
    assert response.status == 200, response.text
    return Image.open(io.BytesIO(response.body))


def photo(size: tuple[int, int], orientation: int) -> tuple[bytes, bytes, tuple[int, int]]:
    """(a photo with a red corner, a mask that is transparent there, the corner's center) as U22 has them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", size, GREEN)
    image.paste(RED, CORNER)
    alpha = Image.new("L", size, 255)
    alpha.paste(0, CORNER)
    alpha = alpha if orientation == 1 else alpha.transpose(TRANSPOSED[orientation])
    mask = Image.new("RGBA", alpha.size)
    mask.putalpha(alpha)
    left, top, right, bottom = alpha.point(lambda value: 255 - value).getbbox()
    center = ((left + right) // 2, (top + bottom) // 2)
    return encoded(image, "JPEG", quality=95, exif=exif), encoded(mask, "PNG"), center


def is_red(color: Any) -> bool:
    return max(abs(a - b) for a, b in zip(color, RED, strict=False)) < 12


@pytest.mark.parametrize("size", [(64, 48), (48, 48)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_over_a_photo(
    client: Client, folders: Folders, size: tuple[int, int], orientation: int
) -> None:
    """Reports: Comfy-Org/ComfyUI#10640, ltdrdata/ComfyUI-Manager#2255."""
    data, mask_file, center = photo(size, orientation)
    upright = size[::-1] if orientation > 4 else size
    assert upload(client, data, "photo.jpg")[0] == 200
    reference = json.dumps({"filename": "photo.jpg", "type": "input"})
    status, answer = upload(client, mask_file, "mask.png", "mask", original_ref=reference)
    assert (status, answer["name"]) == (200, "mask.png")
    with context.using(folders):
        image, mask = LoadImage().load_image("mask.png")
        original = LoadImage().load_image("photo.jpg")[0]
    assert image.shape == (1, upright[1], upright[0], 3) and image.equal(original)
    with Image.open(io.BytesIO(mask_file)) as drawn:
        assert np.array_equal(mask[0].numpy() == 1, np.asarray(drawn)[..., 3] == 0)
    assert is_red(view(client, "mask.png", "channel=rgb").getpixel(center))
    for options in ("preview=webp;90", "preview=jpeg", "channel=rgb"):
        shown = view(client, "photo.jpg", options)
        assert shown.size == upright and is_red(shown.convert("RGB").getpixel(center)), options
    assert view(client, "photo.jpg", "channel=a").size == upright


@pytest.mark.parametrize(
    ("reference", "status"),
    [
        ('{"filename": "a.png", "type": "output"}', 200),
        ('{"filename": "a.png"}', 200),
        ('{"filename": "a.png", "subfolder": null, "type": null}', 200),
        ('{"filename": "a.png [output]", "type": "input"}', 200),
        ('{"filename": "sub/b.png [input]"}', 200),
        ('{"filename": "b.png", "subfolder": "sub", "type": "input"}', 200),
        ('{"filename": "b.png", "type": "input"}', 404),
        ('{"filename": "../a.png"}', 400),
        ('{"filename": "a.png", "type": "user"}', 400),
        ('{"filename": "a.png", "subfolder": ["x"]}', 400),
        ('{"filename": 5}', 400),
        ("{}", 400),
        ("[1]", 400),
        ("null", 400),
        ("{", 400),
        ("[" * 100_000, 400),
    ],
)
def test_what_a_mask_refers_to(client: Client, folders: Folders, reference: str, status: int) -> None:
    """`original_ref` as the editor and its clipspace send it; output is the default folder, as in ComfyUI."""
    image = Image.new("RGB", (6, 4), "red")
    (folders.input / "sub").mkdir()
    for path in (folders.output / "a.png", folders.input / "sub" / "b.png"):
        image.save(path)
    answer = upload(client, encoded(image, "PNG"), "m.png", "mask", original_ref=reference)
    assert answer[0] == status
    assert (folders.input / "m.png").is_file() == (status == 200)
    if status == 400:
        assert answer[1]["error"] and len(answer[1]["error"]) < 500


def test_a_mask_keeps_texts_and_profile_and_is_a_png(client: Client, folders: Folders) -> None:
    info = PngInfo()
    info.add_text("prompt", '{"1": "红"}')
    image = Image.new("RGB", (6, 4), "red")
    image.save(folders.input / "a.png", pnginfo=info, icc_profile=b"profile" * 300_000)
    reference = json.dumps({"filename": "a.png", "type": "input"})
    answer = upload(client, encoded(image, "PNG"), "mask.webp", "mask", original_ref=reference)
    assert answer == (200, {"name": "mask.png", "subfolder": "", "type": "input"})
    saved = decode(folders.input / "mask.png", "mask.png")
    assert saved.texts == {"prompt": '{"1": "红"}'} and saved.profile == b"profile" * 300_000
    assert upload(client, b"", "mask.png", "mask", original_ref=reference)[0] == 400
    other = upload(client, encoded(Image.new("L", (5, 4)), "PNG"), "m.png", "mask", original_ref=reference)
    assert other[0] == 400 and "(6, 4), got (5, 4)" in other[1]["error"]


def test_every_listed_ending_is_uploaded_listed_loaded_and_shown(client: Client, folders: Folders) -> None:
    """Browsers save .jfif, .jpe, .avif, .apng; the content counts, not the ending."""
    image = Image.new("RGB", (64, 48), (200, 60, 20))
    kinds = {"image/apng": "PNG", "image/jpeg": "JPEG"}
    names = []
    for ending, media_type in MEDIA_TYPES.items():
        kind = kinds.get(media_type, media_type.partition("/")[2].upper())
        if kind == "AVIF" and not features.check("avif"):
            continue
        for name in (f"a{ending}", f"A{ending}".upper()):
            names.append(name)
            assert upload(client, encoded(image, kind), name)[0] == 200, name
            response = client.get(f"/api/view?filename={name}&type=input")
            assert response.headers["Content-Type"] == media_type
            assert view(client, name, "preview=webp;90").size == (64, 48)
            with context.using(folders):
                assert LoadImage().load_image(name)[0].shape == (1, 48, 64, 3)
    info = client.get_json("/api/object_info/LoadImage")
    assert info["LoadImage"]["input"]["required"]["image"][0] == sorted(names)
    assert len(client.get_json("/internal/files/input")) == len(names)


def large_texts() -> dict[str, bytes]:
    """PNGs with 3 MB of text in each form, with a 2 MB profile."""
    image, large = Image.new("RGB", (64, 48), (200, 60, 20)), "fox " * 750_000
    found = {}
    for name, zipped in (("ztxt.png", True), ("text.png", False)):
        info = PngInfo()
        info.add_text("prompt", large, zip=zipped)
        found[name] = encoded(image, "PNG", pnginfo=info)
    info = PngInfo()
    info.add_itxt("prompt", large, zip=True)
    return found | {
        "itxt.png": encoded(image, "PNG", pnginfo=info),
        "iccp.png": encoded(image, "PNG", icc_profile=bytes(2_000_000)),
    }


def test_images_with_large_metadata(
    client: Client, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files that Pillow's own limits refuse. Reports: python-pillow/Pillow#8363, #2445."""
    monkeypatch.setattr(png_file, "MAX_METADATA", 2**22)
    for name, data in large_texts().items():
        assert upload(client, data, name)[0] == 200, name
        assert view(client, name, "preview=webp").size == (64, 48)
        with context.using(folders):
            assert LoadImage().load_image(name)[0].shape == (1, 48, 64, 3)
    info = PngInfo()
    info.add_text("comment", "x" * 2**22)
    data = encoded(Image.new("RGB", (64, 48)), "PNG", pnginfo=info)
    (folders.input / "much.png").write_bytes(data)
    with context.using(folders), pytest.raises(ValueError, match="too large metadata"):
        LoadImage().load_image("much.png")
    response = client.get("/api/view?filename=much.png&type=input&preview=webp")
    for status, answer in (upload(client, data, "b.png"), (response.status, response.json)):
        sentence = answer["error"]
        assert status == 400 and "too large metadata" in sentence and "truncated" not in sentence
    assert client.get("/api/view?filename=much.png&type=input").status == 200, "unconverted"


def test_what_does_not_load_cannot_be_uploaded(client: Client, folders: Folders) -> None:
    image = Image.new("RGB", (64, 48), (200, 60, 20))
    for name, data, says in (
        ("cut.jpg", encoded(image, "JPEG")[:-20], "damaged or truncated"),
        ("cut.png", encoded(image, "PNG")[:-30], "damaged or truncated"),
        ("bomb.png", encoded(Image.new("1", (12000, 12000)), "PNG"), "too large"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "is not an image; upload one of .png, "),
        ("photo.jpg", b"\0\0\0\x18ftypheic", "it is HEIC, which is not supported"),
        ("script.png", b"%!PS-Adobe-3.0\n(x) print", "it is PostScript, which is not supported"),
        ("a.png", b"", "it is empty"),
        ("", encoded(image, "PNG"), "the upload has no file in its field image; choose an image"),
        (".png", encoded(image, "PNG"), "is not an image"),
    ):
        status, answer = upload(client, data, name)
        assert status == 400 and says in answer["error"], name
    assert not list(folders.input.iterdir())


def test_conversions_that_a_format_cannot_have(client: Client, folders: Folders) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(folders.input / "a.png")
    Image.new("RGB", (17000, 2)).save(folders.input / "wide.png")
    assert view(client, "a.png", "preview=jpeg&channel=a").format == "WEBP", "JPEG has no alpha"
    assert view(client, "wide.png", "preview=webp").format == "PNG", "WebP has at most 16383 on a side"
    for preview in ("jpeg;0", "jpeg;99999", "webp;" + "9" * 5000, "webp;²", "jpeg;-1", "jpeg;"):
        assert view(client, "a.png", f"preview={preview}").size == (8, 8)
    assert view(client, "a.png", "preview=bmp").format == "PNG"


def test_a_long_conversion_blocks_no_other_request(
    client: Client, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(folders.input / "a.png")
    answered = threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        assert answered.wait(30), "the server answers nothing meanwhile"
        return decode(*arguments, **options)

    monkeypatch.setattr(image_routes, "decode", slow)

    async def both() -> list[int]:
        async def shown() -> int:
            async with client.http.get("/api/view?filename=a.png&type=input&preview=webp") as response:
                return response.status

        async def other() -> int:
            await asyncio.sleep(0.05)
            async with client.http.get("/api/settings") as response:
                answered.set()
                return response.status

        return list(await asyncio.gather(shown(), other()))

    assert client.runner.run(both()) == [200, 200]


@pytest.mark.parametrize("value", [5, None, True, "", {"a": 1}, "n" * 300, "a\0b", "../a.png", "missing.png"])
def test_values_that_name_no_image(folders: Folders, value: Any) -> None:
    with context.using(folders):
        sentence = LoadImage.VALIDATE_INPUTS(value)
    assert isinstance(sentence, str) and "choose or upload one" in sentence and len(sentence) < 500
