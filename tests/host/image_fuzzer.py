"""Damaged image files: whole ones of each format and color mode with bytes, chunks and lengths gone wrong."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

SIZE = (24, 16)
INTEGERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    2**32 - 1,
)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_files() -> dict[str, bytes]:
    """Whole files by name, of every format that is read."""
    values = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    rgba = Image.fromarray(values)
    rgb, gray, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(16)
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngInfo()
    info.add_text("prompt", "{}" * 50)
    info.add_text("packed", "fox " * 500, zip=True)
    info.add_itxt("workflow", "ü" * 50, zip=True)
    found = {
        "rgb.png": encoded(rgb, "PNG", pnginfo=info, icc_profile=bytes(300), exif=exif),
        "deep.png": encoded(deep, "PNG", transparency=int(values[0, 0, 0]) * 257),
        "palette.png": encoded(palette, "PNG", transparency=bytes(range(16))),
        "animation.png": encoded(rgba, "PNG", save_all=True, append_images=[rgba.rotate(180)]),
        "rgb.jpg": encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True, icc_profile=bytes(300)),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "animation.gif": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True, exif=exif),
        "animation.webp": encoded(rgba, "WEBP", save_all=True, append_images=[rgba.rotate(180)]),
        "rgb.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(palette, "BMP"),
        "gray.tif": encoded(gray, "TIFF"),
        "float.tif": encoded(gray.convert("F"), "TIFF"),
        "pages.tif": encoded(rgb, "TIFF", save_all=True, append_images=[gray]),
        "rle.bmp": rle_bmp(),
    }
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg"):
        found[f"{compression}.tif"] = encoded(rgb, "TIFF", compression=compression, exif=exif)
    if features.check("avif"):
        found["rgba.avif"] = encoded(rgba, "AVIF", exif=exif)
        found["animation.avif"] = encoded(rgb, "AVIF", save_all=True, append_images=[rgb.rotate(180)])
    return found


def rle_bmp() -> bytes:
    """A BMP of 8 bits with run lengths, which Pillow reads but does not write."""
    pixels = (bytes((SIZE[0], 7, 0, 0)) * (SIZE[1] - 1)) + bytes((0, 2, 3, 0, SIZE[0] - 3, 9, 0, 1))
    offset = 54 + 4 * 256
    head = struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset)
    head += struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    return head + bytes(range(256)) * 4 + pixels


class ImageFuzzer:
    """Gives damaged files; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.files = whole_files()
        self.names = sorted(self.files)

    def input(self) -> tuple[str, bytes]:
        """(name, contents) of the next file."""
        name = self.random.choice(self.names)
        data = bytearray(self.files[name])
        if data.startswith(b"\x89PNG") and self.random.random() < 0.5:
            return name, self._damaged_chunks(bytes(data))
        for _ in range(self.random.choice((1, 1, 2, 3, 8))):
            self.random.choice((self._flip, self._integer, self._cut, self._repeat, self._splice))(data)
        return name, bytes(data)

    def _place(self, data: bytearray) -> int:
        """A position, in the first bytes half of the time: that is where sizes and counts are."""
        end = min(len(data), 128) if self.random.random() < 0.5 else len(data)
        return self.random.randrange(end) if end else 0

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._place(data)] ^= 1 << self.random.randrange(8)

    def _integer(self, data: bytearray) -> None:
        place, value = self._place(data), self.random.choice(INTEGERS)
        size = self.random.choice([count for count in (1, 2, 4) if value < 256**count])
        data[place : place + size] = value.to_bytes(size, self.random.choice(("big", "little")))

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _repeat(self, data: bytearray) -> None:
        start, end = sorted((self._place(data), self._place(data)))
        data[end:end] = data[start:end] * self.random.choice((1, 2, 10))

    def _splice(self, data: bytearray) -> None:
        other = self.files[self.random.choice(self.names)]
        place, start = self._place(data), self.random.randrange(len(other))
        data[place : place + 64] = other[start : start + self.random.choice((8, 64, 256))]

    def _damaged_chunks(self, data: bytes) -> bytes:
        """A PNG whose chunks are damaged, moved, repeated or left out; their checksums are right."""
        chunks, place = [], 8
        while place < len(data):
            (length,) = struct.unpack_from(">I", data, place)
            chunks.append((data[place + 4 : place + 8], bytearray(data[place + 8 : place + 8 + length])))
            place += length + 12
        for _ in range(self.random.choice((1, 2, 4))):
            index = self.random.randrange(len(chunks))
            action = self.random.randrange(5)
            if action == 0 and len(chunks) > 1:
                del chunks[index]
            elif action == 1:
                chunks.insert(self.random.randrange(len(chunks) + 1), chunks[index])
            elif action == 2:
                self.random.shuffle(chunks)
            else:
                (self._flip, self._integer, self._cut)[self.random.randrange(3)](chunks[index][1])
        checked = (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        return data[:8] + b"".join(checked)
