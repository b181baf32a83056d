"""The chunks of PNGs: texts in every encoding, limits, and a true sentence for each kind of damage."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image
from rectiflux.host import png_file
from rectiflux.host.images import decode
from rectiflux.host.png_file import DamagedPng, LargeMetadata, read_png

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Chunk = tuple[bytes, bytes]
HEADER: Chunk = (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
PIXELS: Chunk = (b"IDAT", zlib.compress((b"\0" + bytes(range(4))) * 4))
END: Chunk = (b"IEND", b"")


def png(*chunks: Chunk) -> bytes:
    """A PNG of these chunks, their checksums right."""
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return SIGNATURE + b"".join(parts)


def text(key: str, data: bytes) -> Chunk:
    return b"tEXt", key.encode() + b"\0" + data


def packed(key: str, data: bytes) -> Chunk:
    return b"zTXt", key.encode() + b"\0\0" + zlib.compress(data)


def international(key: str, data: bytes, compress: bool = False) -> Chunk:
    data = zlib.compress(data) if compress else data
    return b"iTXt", key.encode() + bytes((0, compress, 0)) + b"en\0schl\xc3\xbcssel\0" + data


FOX, GRUN = "红 fox ü 🦊", "a grün fox"


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([text("prompt", FOX.encode())], FOX),
        ([text("prompt", GRUN.encode("latin-1"))], GRUN),
        ([packed("prompt", FOX.encode())], FOX),
        ([packed("prompt", GRUN.encode("latin-1"))], GRUN),
        ([international("prompt", FOX.encode())], FOX),
        ([international("prompt", FOX.encode(), compress=True)], FOX),
        ([text("prompt", GRUN.encode()), international("prompt", FOX.encode())], FOX),
        ([international("prompt", FOX.encode()), text("prompt", GRUN.encode())], GRUN),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_texts_in_every_encoding(chunks: list[Chunk], expected: str, after: bool) -> None:
    """UTF-8 first, else Latin-1; before or after the pixels; the later of two counts."""
    body = [PIXELS, *chunks] if after else [*chunks, PIXELS]
    found = read_png(io.BytesIO(png(HEADER, *body, END)))
    assert found.texts == {"prompt": expected} and found.has_end
    assert (found.width, found.height, found.bit_depth) == (4, 4, 8)


def test_texts_that_are_damaged_are_left_out() -> None:
    chunks = (b"zTXt", b"a\0\0junk"), (b"iTXt", b"b\0\1\0\0\0junk"), (b"iTXt", b"c"), (b"tEXt", b"d")
    assert read_png(io.BytesIO(png(HEADER, *chunks, PIXELS, END))).texts == {"c": "", "d": ""}


LIMIT = 2**20
HALF = bytes(LIMIT // 2 + 2)


@pytest.mark.parametrize(
    "chunks",
    [
        [packed("a", HALF), packed("b", HALF)],
        [international("a", HALF, compress=True), text("b", HALF)],
        [(b"iCCP", b"p\0\0" + zlib.compress(HALF)), packed("b", HALF)],
        [text("a", HALF), text("b", HALF)],
        [(b"eXIf", HALF), packed("b", HALF)],
    ],
)
def test_metadata_has_one_limit_whatever_its_form(
    chunks: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file cannot expand without bound: 32 MB of zeros take 32 KB as zTXt."""
    assert png_file.MAX_METADATA == 3 * 2**23
    monkeypatch.setattr(png_file, "MAX_METADATA", LIMIT)
    data = png(HEADER, *chunks, PIXELS, END)
    with pytest.raises(LargeMetadata, match="^has too large metadata: the limit is 1 MB"):
        read_png(io.BytesIO(data))
    with pytest.raises(ValueError, match="^a.png has too large metadata: .*; save the image without it$"):
        decode(data, "a.png")
    single = read_png(io.BytesIO(png(HEADER, chunks[0], PIXELS, END)))
    assert single.texts or single.profile == HALF or single.exif == HALF


def test_a_long_chunk_is_refused_before_it_is_read() -> None:
    head = png(HEADER) + struct.pack(">I4s", 2**31 - 1, b"tEXt")
    with pytest.raises(LargeMetadata):
        read_png(io.BytesIO(head))


WHOLE = png(HEADER, text("prompt", b"{}"), PIXELS, END)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GIF89a", "it has no PNG signature"),
        (SIGNATURE, "it has no pixels: the chunk IDAT is missing"),
        (png(HEADER, END), "it has no pixels: the chunk IDAT is missing"),
        (png(HEADER, text("prompt", b"{}"), END), "it has no pixels: the chunk IDAT is missing"),
        (png(PIXELS, HEADER, END), "its first chunk must be IHDR, got IDAT"),
        (png(text("a", b"b"), HEADER, PIXELS, END), "its first chunk must be IHDR, got tEXt"),
        (png((b"\xff\0\n'", b""), HEADER, PIXELS, END), r"its first chunk must be IHDR, got \xff\x00\n'"),
        (png(HEADER, HEADER, PIXELS, END), "it has two chunks IHDR"),
        (png(HEADER, PIXELS, (b"PLTE", bytes(6)), END), "its chunk PLTE comes after its pixels (IDAT)"),
        (png((b"IHDR", bytes(5)), PIXELS, END), "its chunk IHDR must have 13 bytes, got 5"),
        (png((b"IHDR", bytes(13)), PIXELS, END), "its size is 0 x 0"),
        (WHOLE[:70], "it ends within its chunk IDAT"),
        (WHOLE[:38], "it ends within a chunk's header"),
        (WHOLE.replace(b"{}", b"[]"), "its chunk tEXt has a wrong checksum"),
    ],
)
def test_what_is_damaged_is_named(data: bytes, says: str) -> None:
    with pytest.raises(DamagedPng) as caught:
        read_png(io.BytesIO(data))
    assert str(caught.value) == says


def test_pixels_split_by_other_chunks_and_an_invalid_animation_are_read() -> None:
    kind, data = PIXELS
    plain = decode(png(HEADER, PIXELS, END), "a.png").frames[0].colors
    for chunks in (
        [(kind, data[:9]), text("a", b"b"), (kind, data[9:])],
        [(b"acTL", bytes(8)), PIXELS],
        [(b"acTL", struct.pack(">II", 1, 0)), (b"acTL", struct.pack(">II", 1, 0)), PIXELS],
        [(b"acTL", b""), (b"unKn", b"x" * 5000), PIXELS],
    ):
        assert (decode(png(HEADER, *chunks, END), "a.png").frames[0].colors == plain).all()


def test_the_pixels_are_a_png_of_their_own() -> None:
    found = read_png(io.BytesIO(png(HEADER, text("a", b"b" * 9000), (b"gAMA", bytes(4)), PIXELS, END)))
    with Image.open(found.pixels) as image:
        assert image.size == (4, 4) and image.info == {} and len(found.pixels.getvalue()) < 100
