"""Decodes image files for every door: LoadImage, uploads, masks, /view.

One list of formats and endings, EXIF orientation applied, and limits that are checked before pixels are
decoded. Pixels are ComfyUI's (LoadImage of nodes.py, 0.33), with two differences: mirrored EXIF orientations
are upright here, and values of 8-bit images are exactly value / 255.
"""

from __future__ import annotations

import re
import struct
import threading
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from .json_reader import one_line
from .png_file import SIGNATURE, DamagedPng, LargeMetadata, PngFile, read_png

MEDIA_TYPES = {
    ".png": "image/png",
    ".apng": "image/apng",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jpe": "image/jpeg",
    ".jfif": "image/jpeg",
    ".pjpeg": "image/jpeg",
    ".pjp": "image/jpeg",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".dib": "image/bmp",
    ".gif": "image/gif",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".avif": "image/avif",
    ".avifs": "image/avif",
}
"""Endings of images, and how they are sent. The format is detected by content, not by ending."""
SIGNATURES = (
    (SIGNATURE, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
"""Formats whose frames become a batch; of the pages of others the first is used, as in ComfyUI."""
COUNTED = ("PNG", "WEBP", "AVIF")
"""Formats that have the number of frames in their header; a GIF's are counted while they are decoded."""
MAX_PIXELS = 2**26
"""Pixels of all frames together: one image of 8192 x 8192, which takes 1 GB as IMAGE and MASK."""
MAX_SIDE = 2**16 - 1
MAX_FILE_BYTES = 2**29
MIN_FRAME = 64 * 64
"""Pixels that a smaller frame counts: the size of its MASK without alpha."""
MAX_SCANS = 200
"""Scans of a progressive JPEG, each of which takes the time of a whole image; encoders write about ten."""
MAX_SEGMENTS = 10_000
"""Segments of a JPEG; those of a large profile or depth map are some hundreds."""
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""The markers of segments, all of which but the end (D9) have a length. See ITU-T T.81, table B.1."""
ORIENTATION = 0x0112
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image of each EXIF orientation becomes upright."""

_DECODING = threading.Lock()  # one image at a time, so that requests together stay within the limits


@dataclass(frozen=True)
class Frame:
    """One image: `colors` [H, W, 3] of 8 bits or [H, W] (grayscale) of 16, `alpha` [H, W] of 8 bits."""

    colors: np.ndarray
    alpha: np.ndarray | None

    def pillow(self) -> Image.Image:
        """The frame as an RGB or RGBA image of 8 bits."""
        colors = self.colors
        if colors.ndim == 2:
            colors = np.repeat((colors >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        image = Image.fromarray(np.ascontiguousarray(colors))
        if self.alpha is not None:
            image.putalpha(Image.fromarray(np.ascontiguousarray(self.alpha)))
        return image


@dataclass(frozen=True)
class Decoded:
    """A file's frames, all of one size.

    `has_palette`: ComfyUI's mask has the image's size. `notes`: what of the file is not used, in sentences.
    """

    frames: list[Frame]
    has_palette: bool
    texts: dict[str, str] = field(default_factory=dict)
    profile: bytes | None = None
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """IMAGE [B, H, W, 3] and MASK [B, H, W] (1 = transparent), or [B, 64, 64] of zeros without alpha."""
        count, (height, width) = len(self.frames), self.frames[0].colors.shape[:2]
        image = np.empty((count, height, width, 3), np.float32)
        has_mask = self.has_palette or any(frame.alpha is not None for frame in self.frames)
        mask = np.zeros((count, height, width) if has_mask else (count, 64, 64), np.float32)
        for index, frame in enumerate(self.frames):
            colors = frame.colors if frame.colors.ndim == 3 else frame.colors[..., None]
            scale = np.float32(np.iinfo(colors.dtype).max)
            np.divide(colors, scale, out=image[index], dtype=np.float32)
            if frame.alpha is not None:
                np.divide(frame.alpha, np.float32(255), out=mask[index], dtype=np.float32)
                np.subtract(1, mask[index], out=mask[index])
        return torch.from_numpy(image), torch.from_numpy(mask)


def decode(source: Path | bytes, name: str, first_only: bool = False) -> Decoded:
    """The frames of an image file, upright; `name` is the file's in errors.

    Raises ValueError, one sentence, for a file that is missing, damaged, too large or of another format.
    """
    name = one_line(name)
    data = source if isinstance(source, bytes) else _read(source, name)
    kind = _supported_format(data, name)
    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about damaged files; what matters raises
            return _Decoder(data, kind, name).decode(first_only)
    except _Refused as error:
        raise ValueError(str(error)) from error
    except LargeMetadata as error:
        raise ValueError(f"{name} {error}") from error
    except DamagedPng as error:
        raise _unreadable(name, f"it is damaged or truncated ({error})") from error
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than there is; make the image smaller") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name)) from error
    except Exception as error:  # decoders of damaged files raise almost any class
        raise _unreadable(name, "it is damaged or truncated") from error


class _Refused(ValueError):
    """A limit or a color mode; the message is a whole sentence."""


def _unreadable(name: str, reason: str, advice: str = "use the original file") -> ValueError:
    return ValueError(f"{name} is not a readable image; {reason}, {advice}")


def _too_large(name: str, got: str = "more") -> str:
    return (
        f"{name} is too large: the limit is {MAX_PIXELS:,} pixels in all frames and {MAX_SIDE} on a side, "
        f"got {got}; make it smaller"
    )


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ValueError(f"the image {name} no longer exists; choose or upload one") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}; choose or upload another") from error
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(
            f"{name} is too large: the limit is {MAX_FILE_BYTES // 2**20} MB, got more; make it smaller"
        )
    return data


def _supported_format(data: bytes, name: str) -> str:
    """The format in FORMATS that the file's first bytes say. Raises ValueError for any other."""
    if not data:
        raise _unreadable(name, "it is empty")
    kind = _format(data)
    if kind == "AVIF" and not features.check("avif"):
        reason = "it is AVIF, for which this Pillow has no codec"
        raise _unreadable(name, reason, "install Pillow 11.3 or later or save it as PNG or JPEG")
    if kind not in FORMATS:
        what = f"it is {kind}, which is not supported" if kind else f"it must be one of {', '.join(FORMATS)}"
        raise _unreadable(name, what, "save it as PNG or JPEG")
    return kind


def _format(data: bytes) -> str | None:
    for signature, kind in SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] != b"ftyp":
        return None
    end = min(max(int.from_bytes(data[:4], "big"), 12), 256)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    is_heic = brands & {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
    return "HEIC" if is_heic else "a video"


class _Decoder:
    def __init__(self, data: bytes, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.pixels = 0
        self.png = PngFile()
        if kind == "PNG":
            self.png = read_png(BytesIO(data))
            self.count(self.png.width, self.png.height)
            self.pixels = 0
            data = self.png.pixels.getvalue()
        elif kind == "JPEG":
            _check_scans(data, name)
        self.data = data

    def count(self, width: int, height: int, frames: int = 1) -> None:
        """Count the pixels of frames. Raises _Refused beyond the limits."""
        self.pixels += max(width * height, MIN_FRAME) * frames
        if self.pixels > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise _Refused(_too_large(self.name, f"{self.pixels:,} of {width} x {height}"))

    def decode(self, first_only: bool) -> Decoded:
        frames: list[Frame] = []
        notes: list[str] = []
        skipped = 0
        with Image.open(BytesIO(self.data), formats=[self.kind]) as image:
            has_palette = image.mode == "P" or self.kind == "GIF"
            profile = image.info.get("icc_profile") or self.png.profile
            texts = self.png.texts
            if self.kind in COUNTED and not first_only:
                self.count(*image.size, frames=image.n_frames)
                self.pixels = 0
            while True:
                frame = self._frame(image)
                if frames and frame.colors.shape != frames[0].colors.shape:
                    skipped += 1
                else:
                    frames.append(frame)
                if first_only:
                    break
                try:
                    image.seek(image.tell() + 1)
                except EOFError:
                    break
                if self.kind not in ANIMATED:
                    if self.kind == "TIFF":
                        notes.append(f"{self.name} has several pages; the first is used")
                    break
        if skipped:
            notes.append(f"{self.name} has {skipped} frames of another size, which are not used")
        return Decoded(frames, has_palette, texts, profile, notes)

    def _frame(self, image: Image.Image) -> Frame:
        self.count(*image.size)
        image.load()
        if self.kind != "TIFF":  # Pillow's loading of TIFF includes it
            method = TRANSPOSED.get(exif_orientation(self.png.exif or image.info.get("exif") or b""))
            transparency = image.info.get("transparency")
            image = image if method is None else image.transpose(method)
            if transparency is not None:
                image.info["transparency"] = transparency
        try:
            return _to_frame(image, self.kind, self.png.bit_depth)
        except (ValueError, OSError) as error:  # such as LAB
            raise _Refused(
                f"{self.name} has the color mode {image.mode}, which is not supported; save it as PNG or JPEG"
            ) from error


def _check_scans(data: bytes, name: str) -> None:
    """Raise _Refused for a JPEG of too many scans or segments, up to its end; a phone's video may follow."""
    scans = segments = 0
    position = 2
    while (marker := _SEGMENT.search(data, position)) and marker[0] != b"\xff\xd9":
        segments += 1
        if segments > MAX_SEGMENTS:
            raise _Refused(
                f"{name} has too many segments: the limit is {MAX_SEGMENTS:,}, got more; "
                "save it as PNG or JPEG"
            )
        scans += marker[0] == b"\xff\xda"
        start = marker.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
    if scans > MAX_SCANS:
        raise _Refused(
            f"{name} has too many scans: the limit is {MAX_SCANS}, got {scans}; save it as PNG or JPEG"
        )


def _to_frame(image: Image.Image, kind: str, bit_depth: int) -> Frame:
    """A decoded image's values. Raises ValueError for a color mode without conversion."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        gray = np.asarray(image).astype(np.uint16)
        alpha = np.where(gray == transparent, 0, 255).astype(np.uint8) if transparent is not None else None
        return Frame(gray, alpha)
    if isinstance(transparent, tuple) and bit_depth == 16:  # Pillow keeps 8 bits of such colors
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode not in ("LA", "PA", "RGBA") and transparent is None:
        return Frame(np.asarray(image.convert("RGB")), None)
    values = np.asarray(image.convert("RGBA"))
    return Frame(values[..., :3], values[..., 3])


def exif_orientation(exif: bytes) -> int:
    """The orientation 1..8 in EXIF data, 1 where it has none or is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, form, _ = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{'I' if form == 4 else 'H'}", tiff, entry + 8)
                return value if value in TRANSPOSED else 1
    except struct.error:  # truncated
        pass
    return 1
