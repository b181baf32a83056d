"""The server's routes of images: /view, uploads, masks. Files are decoded in threads (images.py).

Every path in a request is checked to stay in its folder (files.contained); every file is written atomically
(files.write).
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .files import IMAGE_SUFFIXES, Folders, write
from .images import MEDIA_TYPES, decode
from .json_reader import quoted, read_json_object

MAX_ENCODED_SIDE = {"webp": 16383, "jpeg": 65500}
"""Pixels on a side that a format can have; larger previews are PNG."""
DEFAULT_QUALITY = 90


class ImageRoutes:
    """Handlers over the host's folders."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._saving = asyncio.Lock()  # between finding a free name and writing under it

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.get("/view", self.view),
            web.get("/internal/files/{kind}", self.list_images),
            web.post("/upload/image", self.upload_image),
            web.post("/upload/mask", self.upload_mask),
        ]

    async def view(self, request: web.Request) -> web.StreamResponse:
        """An image, converted with `channel` (rgb, a) or `preview` (webp;90)."""
        query = request.query
        path = self._existing(
            query.get("filename", ""), query.get("subfolder", ""), query.get("type", "output")
        )
        headers = {"Content-Disposition": "inline", "Cache-Control": "no-cache"}
        media_type = MEDIA_TYPES.get(path.suffix.lower())
        if media_type is None:
            headers = {"Content-Disposition": "attachment", "Content-Type": "application/octet-stream"}
        elif query.get("channel", "rgba") != "rgba" or "preview" in query:
            channel, preview = query.get("channel", "rgba"), query.get("preview", "")
            kind, body = await asyncio.to_thread(_converted, path, channel, preview)
            return web.Response(body=body, content_type=kind, headers=headers)
        else:
            headers["Content-Type"] = media_type
        return web.FileResponse(path, headers=headers)

    async def list_images(self, request: web.Request) -> web.Response:
        """Names of the images directly in a folder, newest first, as `image.png [input]`."""
        kind = request.match_info["kind"]
        paths = [self.folders.locate(name, kind=kind) for name in self.folders.images(kind)]
        paths.sort(key=_modified, reverse=True)
        return web.json_response([f"{path.name} [{kind}]" for path in paths])

    def _existing(self, name: str, subfolder: str, kind: str) -> Path:
        """The path of an existing file, else 404. `name` may state its folder: `image.png [input]`."""
        annotated = name.endswith("]")
        path = self.folders.annotated(name) if annotated else self.folders.locate(name, subfolder, kind)
        if not path.is_file():
            raise web.HTTPNotFound(text=f"the image {quoted(name)} does not exist; choose or upload one")
        return path

    async def upload_image(self, request: web.Request) -> web.Response:
        """Save an uploaded image under its name; under a new name where another image has it."""
        upload = self._upload(await request.post())
        await asyncio.to_thread(decode, upload.data, upload.path.name)
        return await self._save(upload)

    async def upload_mask(self, request: web.Request) -> web.Response:
        """Save the image named by `original_ref` as PNG, with the alpha channel of the uploaded one."""
        post = await request.post()
        upload = self._upload(post)
        original = self._existing(*_reference(post))
        data = await asyncio.to_thread(_masked, original, upload)
        return await self._save(replace(upload, data=data, path=upload.path.with_suffix(".png")))

    def _upload(self, post: Any) -> _Upload:
        """The file in the field `image`. Raises ValueError for a missing field or another ending."""
        field = post.get("image")
        if not isinstance(field, web.FileField):
            raise ValueError("the upload has no file in its field image; choose an image")
        name = Path(str(field.filename).replace("\\", "/")).name
        subfolder, kind = _text(post, "subfolder", ""), _text(post, "type", "input")
        path = self.folders.locate(name, subfolder, kind)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{quoted(name)} is not an image; upload one of {', '.join(IMAGE_SUFFIXES)}, "
                "or save it as PNG or JPEG"
            )
        overwrite = post.get("overwrite") in ("true", "1")
        return _Upload(field.file.read(), path, subfolder, kind, overwrite)

    async def _save(self, upload: _Upload) -> web.Response:
        async with self._saving:
            name = await asyncio.to_thread(_write_upload, upload)
        return web.json_response({"name": name, "subfolder": upload.subfolder, "type": upload.kind})


@dataclass(frozen=True)
class _Upload:
    """An uploaded file and where it goes."""

    data: bytes
    path: Path
    subfolder: str
    kind: str
    overwrite: bool


def _write_upload(upload: _Upload) -> str:
    """Write the file, under a new name where another has it; returns the name."""
    path, copies = upload.path, 0
    while not upload.overwrite and path.exists() and not _has_content(path, upload.data):
        copies += 1
        path = upload.path.with_name(f"{upload.path.stem} ({copies}){upload.path.suffix}")
    write(path, upload.data)
    return path.name


def _has_content(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _modified(path: Path) -> float:
    """When a file was written; 0 for one that was deleted since it was listed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(post: Any, name: str, default: str) -> str:
    """A text field of a form; `default` when it is missing or empty. Raises ValueError for a file."""
    value = post.get(name) or default
    if not isinstance(value, str):
        raise ValueError(f"the field {name} must be text, got a file; send its value")
    return value


def _reference(post: Any) -> tuple[str, str, str]:
    """(name, subfolder, folder) of the image that `original_ref` names. Raises ValueError."""
    reference = read_json_object(_text(post, "original_ref", "{}"), "original_ref")
    values = [reference.get(key) or "" for key in ("filename", "subfolder", "type")]
    for key, value in zip(("filename", "subfolder", "type"), values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"original_ref must have text as {key}, got {quoted(value)}")
    if not values[0]:
        raise ValueError('original_ref must name an image, as {"filename": "a.png", "type": "input"}')
    return values[0], values[1], values[2] or "output"


def _masked(original: Path, upload: _Upload) -> bytes:
    """A PNG of the original, upright, with the uploaded image's alpha. Raises ValueError."""
    decoded = decode(original, original.name, first_only=True)
    image = decoded.frames[0].pillow().convert("RGB")
    mask = decode(upload.data, upload.path.name, first_only=True).frames[0].pillow()
    if image.size != mask.size:
        raise ValueError(
            f"the mask must have the image's size {image.size}, got {mask.size}; draw it on this image"
        )
    image.putalpha(mask.convert("RGBA").getchannel("A"))
    texts = PngInfo()
    for name, value in decoded.texts.items():
        if name:
            texts.add_text(name, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts, icc_profile=decoded.profile, compress_level=4)
    return buffer.getvalue()


def _converted(path: Path, channel: str, preview: str) -> tuple[str, bytes]:
    """(media type, bytes) of an image's colors, of its alpha channel, or of a compressed preview."""
    kind, _, quality = preview.partition(";")
    image = decode(path, path.name, first_only=True).frames[0].pillow()
    if channel == "a":
        alpha = image.convert("RGBA").getchannel("A")
        image = Image.new("RGBA", image.size)
        image.putalpha(alpha)
        kind = "webp" if kind == "jpeg" else kind  # JPEG has no alpha
    elif channel == "rgb" or kind == "jpeg":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) <= MAX_ENCODED_SIDE.get(kind, 0):
        image.save(buffer, kind.upper(), quality=_quality(quality))
        return f"image/{kind}", buffer.getvalue()
    image.save(buffer, "PNG", compress_level=1)
    return "image/png", buffer.getvalue()


def _quality(text: str) -> int:
    """1 to 100; the default where the text is no number."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    return min(max(int(text), 1), 100) if is_number else DEFAULT_QUALITY
