"""Image files become the IMAGE and MASK that ComfyUI's LoadImage makes of them, within limits."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from rectiflux.host.images import MAX_SCANS, MAX_SEGMENTS, TRANSPOSED, decode, exif_orientation

from .image_fuzzer import encoded

WIDTH, HEIGHT = 24, 16
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([X * 10, Y * 15, (X + Y) * 6], -1).astype(np.uint8)
ALPHA = ((X // 4 + Y // 4) % 2 * 155 + 100 - (X < 4) * 100).astype(np.uint8)
GRAY = RGB[..., 0]
DEEP = (X * 2700 + Y * 7).astype(np.uint16)
RGBA = np.dstack([RGB, ALPHA])
COLOR = Image.fromarray(RGB)
PALETTE = COLOR.quantize(16)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
INDICES = np.asarray(PALETTE)
CMYK = np.asarray(COLOR.convert("CMYK"))


def png(kind: int, values: np.ndarray[Any, Any], transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write in color; `kind` is its color type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0))
    trns = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def of_cmyk(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """RGB of CMYK without a profile: each channel times the black that is left."""
    inverse = 255 - values.astype(np.float64)
    return inverse[..., :3] * inverse[..., 3:] / 255


EQUAL = np.all(RGB == RGB[3, 5], axis=-1)
GRAY_ALPHA = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(ALPHA)))
OPAQUE, PALETTE_OPAQUE = None, np.full((HEIGHT, WIDTH), 255)

MODES: dict[str, tuple[Callable[[], bytes], Any, Any, float]] = {
    "rgb.png": (lambda: encoded(COLOR, "PNG"), RGB, OPAQUE, 0),
    "rgba.png": (lambda: encoded(Image.fromarray(RGBA), "PNG"), RGB, ALPHA, 0),
    "gray.png": (lambda: encoded(Image.fromarray(GRAY), "PNG"), GRAY, OPAQUE, 0),
    "gray-alpha.png": (lambda: encoded(GRAY_ALPHA, "PNG"), GRAY, ALPHA, 0),
    "1-bit.png": (
        lambda: encoded(Image.fromarray(GRAY > 99), "PNG"),
        (GRAY > 99) * 255,
        OPAQUE,
        0,
    ),
    "palette.png": (lambda: encoded(PALETTE, "PNG"), PALETTE_RGB, PALETTE_OPAQUE, 0),
    "palette-transparent.png": (
        lambda: encoded(PALETTE, "PNG", transparency=3),
        PALETTE_RGB,
        (INDICES != 3) * 255,
        0,
    ),
    "palette-alpha.png": (
        lambda: encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
        PALETTE_RGB,
        INDICES * 16,
        0,
    ),
    "gray-transparent.png": (
        lambda: encoded(Image.fromarray(GRAY), "PNG", transparency=50),
        GRAY,
        (GRAY != 50) * 255,
        0,
    ),
    "rgb-transparent.png": (
        lambda: encoded(COLOR, "PNG", transparency=tuple(map(int, RGB[3, 5]))),
        RGB,
        ~EQUAL * 255,
        0,
    ),
    "16-bit.png": (lambda: encoded(Image.fromarray(DEEP), "PNG"), DEEP / 257, OPAQUE, 0),
    "16-bit.tif": (lambda: encoded(Image.fromarray(DEEP), "TIFF"), DEEP / 257, OPAQUE, 0),
    "16-bit-transparent.png": (
        lambda: png(0, DEEP, struct.pack(">H", DEEP[3, 5])),
        DEEP / 257,
        (DEEP != DEEP[3, 5]) * 255,
        0,
    ),
    "48-bit.png": (lambda: png(2, RGB.astype(np.uint16) * 257 + 3), RGB, OPAQUE, 0),
    "48-bit-transparent.png": (
        lambda: png(2, RGB.astype(np.uint16) * 257, struct.pack(">HHH", *RGB[3, 5].astype(np.uint16) * 257)),
        RGB,
        ~EQUAL * 255,
        0,
    ),
    "64-bit.png": (lambda: png(6, RGBA.astype(np.uint16) * 257), RGB, ALPHA, 0),
    "32-bit-gray.png": (
        lambda: png(4, np.dstack([DEEP, ALPHA.astype(np.uint16) * 257])),
        DEEP / 257,
        ALPHA,
        1,
    ),
    "rgb.jpg": (lambda: encoded(COLOR, "JPEG", quality=100, subsampling=0), RGB, OPAQUE, 3),
    "gray.jpg": (lambda: encoded(Image.fromarray(GRAY), "JPEG", quality=100), GRAY, OPAQUE, 2),
    "adobe-cmyk.jpg": (
        lambda: encoded(COLOR.convert("CMYK"), "JPEG", quality=100),
        of_cmyk(CMYK),
        OPAQUE,
        4,
    ),
    "cmyk.tif": (lambda: encoded(COLOR.convert("CMYK"), "TIFF"), of_cmyk(CMYK), OPAQUE, 1),
    "rgba.tif": (lambda: encoded(Image.fromarray(RGBA), "TIFF"), RGB, ALPHA, 0),
    "gray-alpha.tif": (lambda: encoded(GRAY_ALPHA, "TIFF"), GRAY, ALPHA, 0),
    "1-bit.tif": (lambda: encoded(Image.fromarray(GRAY > 99), "TIFF"), (GRAY > 99) * 255, OPAQUE, 0),
    "float.tif": (lambda: encoded(Image.fromarray(GRAY * np.float32(1.5)), "TIFF"), GRAY * 1.5, OPAQUE, 1),
    "32-bit.tif": (lambda: encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP, OPAQUE, 0),
    "rgb.bmp": (lambda: encoded(COLOR, "BMP"), RGB, OPAQUE, 0),
    "palette.bmp": (lambda: encoded(PALETTE, "BMP"), PALETTE_RGB, PALETTE_OPAQUE, 0),
    "palette.gif": (lambda: encoded(PALETTE, "GIF"), PALETTE_RGB, PALETTE_OPAQUE, 0),
    "rgba.webp": (
        lambda: encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True),
        RGB,
        ALPHA,
        0,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_color_mode(name: str) -> None:
    """Values by rule: value / (2^bits - 1), clipped to 0..1; MASK is 1 - alpha.

    ComfyUI 0.33 gives the same to 1/255 (2/255 for CMYK). Its masks without alpha have 64 x 64 values, those
    of palettes the image's size.
    """
    make, colors, alpha, tolerance = MODES[name]
    image, mask = decode(make(), name).tensors()
    colors = np.asarray(colors, np.float64).clip(0, 255) / 255
    colors = colors if colors.ndim == 3 else colors[..., None].repeat(3, -1)
    assert image.dtype == mask.dtype == torch.float32 and image.shape == (1, HEIGHT, WIDTH, 3)
    assert np.abs(image[0].numpy() - colors).max() <= tolerance / 255 + 1e-6
    if alpha is None:
        assert mask.shape == (1, 64, 64) and not mask.any()
    else:
        assert mask.shape == (1, HEIGHT, WIDTH)
        assert np.abs(mask[0].numpy() - (1 - np.asarray(alpha, np.float64) / 255)).max() <= 1e-6


KINDS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(kind: str, orientation: int) -> None:
    """Where EXIF 2.3 says that row 0 and column 0 are, for every format that has EXIF data."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF codec")
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = COLOR.copy()
    photo.paste((230, 20, 20), (0, 0, 8, 4))
    image = decode(encoded(photo, kind, exif=exif, **KINDS[kind]), "a").tensors()[0][0].numpy()
    stored = np.asarray(photo, np.float32) / 255
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert image.shape == upright.shape
    assert np.abs(image - upright).mean() < (0.02 if kind == "AVIF" else 0.005)


def test_orientation_with_alpha_and_of_each_frame() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(RGBA), Image.fromarray(RGBA).rotate(180)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], exif=exif)
    image, mask = decode(data, "a.png").tensors()
    assert torch.equal(
        image, torch.from_numpy(np.stack([np.rot90(RGB, -1), np.rot90(RGB, 1)]) / np.float32(255))
    )
    assert torch.equal(mask[0], 1 - torch.from_numpy(np.rot90(ALPHA, -1) / np.float32(255)))


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"", 1),
        (b"junk", 1),
        (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0", 6),
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0", 8),
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x03", 3),
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0", 1),
        (b"MM\0*\0\0\0\x08\0\x09\x01\x13\0\x03\0\0\0\x01\0\x06\0\0", 1),
        (b"MM\0*\xff\xff\xff\xff", 1),
    ],
)
def test_the_orientation_in_exif_data(exif: bytes, orientation: int) -> None:
    assert exif_orientation(exif) == orientation
    assert orientation in (1, *TRANSPOSED)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_become_a_batch(kind: str) -> None:
    frames = [Image.new("RGB", (8, 4), color) for color in ("red", "blue", "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data, "a").tensors()[0][:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert len(decode(data, "a", first_only=True).frames) == 1


def test_of_several_pages_the_first_is_used_and_said() -> None:
    """As in ComfyUI: the other pages of scans, and thumbnails, are no animation."""
    data = encoded(COLOR, "TIFF", save_all=True, append_images=[COLOR.rotate(180)])
    found = decode(data, "scan.tif")
    assert torch.equal(found.tensors()[0][0], torch.from_numpy(RGB) / 255)
    assert found.notes == ["scan.tif has several pages; the first is used"]
    photo = decode(encoded(COLOR, "MPO", save_all=True, append_images=[COLOR]), "photo.jpg")
    assert len(photo.frames) == 1 and photo.notes == []


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of 1 bit."""
    return encoded(Image.new("1", (width, height)), "PNG")


def small_frames(count: int, side: int) -> bytes:
    """A GIF of 2 x 2 frames on a canvas of `side` x `side`."""
    frames = [Image.new("L", (2, 2), index % 256) for index in range(count)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return data[:6] + struct.pack("<HH", side, side) + data[10:]


def many_scans() -> bytes:
    data = encoded(COLOR, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * (MAX_SCANS + 1) + data[-2:]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("12000.png", lambda: flat_png(12000, 12000)),
        ("side.png", lambda: flat_png(70000, 2)),
        ("frames.gif", lambda: small_frames(151, 1800)),
    ],
)
def test_images_beyond_the_limits_are_refused(name: str, make: Callable[[], bytes]) -> None:
    """Small files that take gigabytes without a limit: 9 KB become 3 GB, a GIF of 151 frames 8 GB."""
    data = make()
    assert len(data) < 100_000
    with pytest.raises(
        ValueError, match=f"^{name} is too large: the limit is 67,108,864 pixels in all frames"
    ):
        decode(data, name)


def test_sizes_are_checked_in_the_header() -> None:
    """Sizes as each format's header has them; nothing follows that could be decoded."""
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 54, 40, 2**30, 2**20, 1, 24, 0, 0, 0, 0, 0, 0)
    jpeg = encoded(COLOR, "JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), b"\xf0\0\xf0\0")
    tiff = encoded(COLOR, "TIFF").replace(
        struct.pack("<HHIH", 256, 4, 1, WIDTH), struct.pack("<HHIH", 256, 4, 1, 0)
    )
    webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + b"\xff" * 10
    for name, data in {"a.bmp": bmp, "a.jpg": jpeg, "a.webp": webp, "a.gif": small_frames(1, 65535)}.items():
        with pytest.raises(ValueError, match=f"^{name} is too large: the limit is"):
            decode(data, name)
    with pytest.raises(ValueError, match="^a.tif is not a readable image"):
        decode(tiff, "a.tif")


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each scan of a progressive JPEG takes the time of a whole image."""
    with pytest.raises(ValueError, match="^a.jpg has too many scans: the limit is 200, got 2"):
        decode(many_scans(), "a.jpg")
    assert decode(encoded(COLOR, "JPEG", progressive=True), "a.jpg").frames


def test_a_video_behind_a_jpeg_is_not_counted_as_scans() -> None:
    """Phones append a video of some MB to a photo; any two of its bytes may look like a marker."""
    photo = encoded(COLOR, "JPEG")
    found = decode(photo + b"\xff\xda" * (MAX_SCANS + 1), "motion.jpg").frames[0].colors
    assert np.array_equal(found, decode(photo, "a.jpg").frames[0].colors)
    comments = b"\xff\xfe\0\2" * (MAX_SEGMENTS + 1)
    with pytest.raises(ValueError, match="^a.jpg has too many segments: the limit is 10,000"):
        decode(photo[:2] + comments + photo[2:], "a.jpg")


def test_scans_behind_a_marker_in_a_comment_are_counted() -> None:
    """What looks like the end of the image within a segment is not its end."""
    data = many_scans()
    with pytest.raises(ValueError, match="^a.jpg has too many scans"):
        decode(data[:2] + b"\xff\xfe\0\4\xff\xd9" + data[2:], "a.jpg")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"not an image", "it must be one of PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript, which is not supported"),
        (b"%PDF-1.7", "it is PDF, which is not supported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, which is not supported, save it as PNG or JPEG"),
        (b"\xff\x0a1234", "it is JPEG XL, which is not supported"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp42", "it is a video, which is not supported"),
        (encoded(COLOR, "JPEG")[:-200], "it is damaged or truncated"),
        (encoded(COLOR, "WEBP")[:-20], "it is damaged or truncated"),
        (encoded(COLOR, "PNG")[:-40], "it is damaged or truncated (it ends within its chunk IDAT)"),
        (encoded(COLOR, "TIFF")[:60], "it is damaged or truncated"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(data: bytes, says: str) -> None:
    """By its content, whatever its name; PostScript never starts Ghostscript."""
    with pytest.raises(ValueError) as caught:
        decode(data, "a.png")
    assert str(caught.value).startswith("a.png is not a readable image; ") and says in str(caught.value)


def test_a_tiff_in_lab_colors() -> None:
    """L 128 of 255 is 50 of 100, whose sRGB value is 0.466 (IEC 61966-2-1)."""
    image = decode(encoded(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF"), "a.tif").tensors()[0]
    assert image[0, 0, 0].tolist() == pytest.approx([0.466] * 3, abs=0.02)


def test_avif_without_the_codec_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100)
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(
        ValueError, match="it is AVIF, for which this Pillow has no codec, install Pillow 11.3"
    ):
        decode(data, "a.avif")


def test_a_long_name_is_cut_and_on_one_line() -> None:
    with pytest.raises(ValueError) as caught:
        decode(b"", "a\nb" + "n" * 5000)
    assert str(caught.value).startswith("a b") and len(str(caught.value)) < 300


def test_nothing_but_pixels_changes_an_image() -> None:
    """A color profile is not applied, as in ComfyUI; trailing bytes and unknown chunks are skipped."""
    plain = encoded(COLOR, "PNG")
    for data in (
        encoded(COLOR, "PNG", icc_profile=b"profile" * 400_000, dpi=(300, 300)),
        plain + b"trailing bytes",
        plain[:-12],
    ):
        assert torch.equal(decode(data, "a.png").tensors()[0], decode(plain, "a.png").tensors()[0])
    buffer = io.BytesIO(encoded(COLOR, "PNG", icc_profile=b"profile" * 400_000))
    assert decode(buffer.getvalue(), "a.png").profile == b"profile" * 400_000
