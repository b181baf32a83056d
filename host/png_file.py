"""Reads a PNG's chunks: its texts and color profile, and a copy without them that decodes to the same pixels.

Pillow limits compressed metadata to 1 MB and loses the image beyond that; here the metadata of a file has one
limit, whatever its form. See the PNG specification, third edition, sections 5 and 11.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

from .json_reader import MAX_BYTES

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA = 3 * MAX_BYTES // 2
"""Bytes of a file's texts, profile and EXIF data, decompressed: a prompt and a large workflow."""
MAX_CHUNKS = 200_000
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")


class DamagedPng(ValueError):
    """The file is not a whole PNG; the message says where: "it ends within its chunk IDAT"."""


class LargeMetadata(ValueError):
    """The metadata exceeds the limit; the message continues a sentence after the file's name."""


@dataclass
class PngFile:
    """A PNG's contents.

    `pixels`: the file without metadata. `has_end`: its last chunk is IEND, else it may have lost texts.
    """

    width: int = 0
    height: int = 0
    bit_depth: int = 8
    texts: dict[str, str] = field(default_factory=dict)
    profile: bytes | None = None
    exif: bytes = b""
    pixels: BytesIO = field(default_factory=BytesIO)
    has_end: bool = False


def read_png(file: BinaryIO) -> PngFile:
    """The PNG in a seekable file. Raises DamagedPng, LargeMetadata.

    Of two texts with one key the later counts. Chunks that affect neither pixels nor metadata are skipped.
    """
    reader = _Reader(file)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise DamagedPng("it has no PNG signature")
    for _ in range(MAX_CHUNKS):
        if not reader.read_chunk():
            break
    else:
        raise DamagedPng(f"it has more than {MAX_CHUNKS:,} chunks")
    if b"IDAT" not in reader.seen:
        raise DamagedPng("it has no pixels: the chunk IDAT is missing")
    reader.write_pixels()
    return reader.png


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.png = PngFile()
        self.seen: Counter[bytes] = Counter()
        self.kept: list[tuple[bytes, bytes]] = []
        self.frames = b""
        self.metadata_left = MAX_METADATA
        start = file.tell()
        self.size = file.seek(0, 2)
        file.seek(start)

    def read_chunk(self) -> bool:
        """Read the next chunk; False at the end of the image."""
        head = self.file.read(8)
        if not head:
            return False
        if len(head) < 8:
            raise DamagedPng("it ends within a chunk's header")
        length, kind = struct.unpack(">I4s", head)
        shown = repr(kind)[2:-1]
        self._check_order(kind, shown)
        if kind in METADATA_CHUNKS:
            self._take(length)
        if self.file.tell() + length + 4 > self.size:
            raise DamagedPng(f"it ends within its chunk {shown}")
        if kind not in (*PIXEL_CHUNKS, *ANIMATION_CHUNKS, *METADATA_CHUNKS):
            self.file.seek(length + 4, 1)
            return True
        data, checksum = self.file.read(length), self.file.read(4)
        if struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))) != checksum:
            raise DamagedPng(f"its chunk {shown} has a wrong checksum")
        if kind in METADATA_CHUNKS:
            self._read_metadata(kind, data)
        else:
            self.kept.append((kind, head + data + checksum))
        self.seen[kind] += 1
        if kind == b"IHDR":
            self._read_header(data)
        elif kind == b"acTL":
            self.frames = data[:4]
        self.png.has_end = kind == b"IEND"
        return not self.png.has_end

    def write_pixels(self) -> None:
        """Write the chunks of the pixels; an animation with missing or extra frames becomes a still image."""
        count = self.seen[b"fcTL"]
        is_animation = count > 0 and self.seen[b"acTL"] == 1 and self.frames == struct.pack(">I", count)
        self.png.pixels.write(SIGNATURE)
        for kind, chunk in self.kept:
            if is_animation or kind not in ANIMATION_CHUNKS:
                self.png.pixels.write(chunk)
        self.png.pixels.seek(0)

    def _check_order(self, kind: bytes, shown: str) -> None:
        if not self.seen and kind != b"IHDR":
            raise DamagedPng(f"its first chunk must be IHDR, got {shown}")
        if kind in self.seen and kind in (b"IHDR", b"PLTE"):
            raise DamagedPng(f"it has two chunks {shown}")
        if kind == b"PLTE" and b"IDAT" in self.seen:
            raise DamagedPng("its chunk PLTE comes after its pixels (IDAT)")

    def _read_header(self, data: bytes) -> None:
        if len(data) != 13:
            raise DamagedPng(f"its chunk IHDR must have 13 bytes, got {len(data)}")
        self.png.width, self.png.height, self.png.bit_depth = struct.unpack(">IIB", data[:9])
        if not (0 < self.png.width < 2**31 and 0 < self.png.height < 2**31):
            raise DamagedPng(f"its size is {self.png.width} x {self.png.height}")

    def _take(self, count: int) -> None:
        self.metadata_left -= count
        if self.metadata_left < 0:
            raise LargeMetadata(
                f"has too large metadata: the limit is {MAX_METADATA // 2**20} MB of text, profile and EXIF "
                "data; save the image without it"
            )

    def _decompress(self, data: bytes) -> bytes | None:
        """The decompressed data, counted as metadata; None when it is damaged."""
        try:
            found = zlib.decompressobj().decompress(data, self.metadata_left + 1)
        except zlib.error:
            return None
        self._take(len(found))
        return found

    def _read_metadata(self, kind: bytes, data: bytes) -> None:
        if kind == b"eXIf":
            self.png.exif = data
            return
        key, _, value = data.partition(b"\0")
        compressed = kind in (b"zTXt", b"iCCP")
        if kind == b"iTXt":
            compressed = value[:1] == b"\1"
            value = value[2:].partition(b"\0")[2].partition(b"\0")[2]  # without language, translated key
        elif compressed:
            value = value[1:]  # without the compression method; there is only one
        found = self._decompress(value) if compressed else value
        if kind == b"iCCP":
            self.png.profile = found
        elif found is not None:
            self.png.texts[key.decode("latin-1")] = _decode(found)


def _decode(text: bytes) -> str:
    """Text in UTF-8, else Latin-1: the standard wants Latin-1 in tEXt and zTXt, many programs write UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")
