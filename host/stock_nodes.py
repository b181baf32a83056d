"""LoadImage, SaveImage, PreviewImage and PreviewAny under ComfyUI's ids, so that workflows run in both hosts.

Ids, widgets, wires and file names are ComfyUI's interface (nodes.py and comfy_extras/nodes_preview_any.py,
0.33); the code is our own. Unlike ComfyUI's, LoadImage does not read videos.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from . import context, files
from .images import decode
from .json_reader import quoted

MAX_NAME_BYTES = 200  # before the image's index; file systems allow 255 in all


def read_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE [B, H, W, 3] and MASK [B, H, W] (1 = transparent; [B, 64, 64] of zeros without alpha) of a file.

    An animation gives one image per frame. Raises ValueError for a file that is not a readable image.
    """
    decoded = decode(path, path.name)
    for note in decoded.notes:
        context.notice(note)
    return decoded.tensors()


class LoadImage:
    """Loads an image from the input folder; its transparency is the MASK output."""

    NODE_ID = "LoadImage"
    TITLE = "Load Image"
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["open image", "import image", "upload image", "read image"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "An image in the input folder; upload one with the button or drop it on the node."
        return {
            "required": {"image": (context.folders().images(), {"image_upload": True, "tooltip": tooltip})}
        }

    @classmethod
    def VALIDATE_INPUTS(cls, image):
        if not isinstance(image, str) or not image:
            return f"image must be the name of an image, got {quoted(image)}; choose or upload one"
        folders = context.folders()
        try:
            found = folders.annotated(image).is_file()
        except (ValueError, OSError):  # outside the folder, or a name that the disk cannot have
            found = False
        return found or f"the image {quoted(image)} is not in {folders.input}; choose or upload one"

    @classmethod
    def IS_CHANGED(cls, image):
        digest = hashlib.sha256()
        with context.folders().annotated(image).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def load_image(self, image):
        return read_image(context.folders().annotated(image))


def expand_prefix(prefix: str, width: int, height: int) -> str:
    """A file name prefix with %width%, %height% and the parts of the date and time replaced."""
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    parts = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min}
    padded = {name: f"{value:02}" for name, value in {**parts, "second": now.tm_sec}.items()}
    for name, value in {**values, **padded}.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    return prefix


def checked_prefix(prefix: str, kind: str = "output") -> str:
    """The prefix with forward slashes. Raises ValueError unless it is a name in the folder `kind`."""
    path = PurePosixPath(prefix.replace("\\", "/"))
    if str(path) == ".":
        raise ValueError("filename_prefix must not be empty; enter the start of the images' names")
    if len(path.name.encode()) > MAX_NAME_BYTES:
        got = len(path.name.encode())
        raise ValueError(f"filename_prefix must have at most {MAX_NAME_BYTES} bytes, got {got}; shorten it")
    try:
        context.folders().locate(str(path), kind=kind)
    except ValueError as error:
        raise ValueError(
            f"filename_prefix must stay in the folder {kind}, got {prefix!r}; enter name or subfolder/name"
        ) from error
    return str(path)


def write_images(
    images: Tensor, prefix: str, kind: str, compress_level: int, texts: dict[str, Any]
) -> list[dict[str, str]]:
    """Save an IMAGE as PNGs with `texts` as JSON metadata; returns the files as the editor names them.

    NaN becomes 0. Raises ValueError for a prefix outside the folder, SaveError when a write fails.
    """
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, json.dumps(value))
    path = checked_prefix(expand_prefix(prefix, images.shape[2], images.shape[1]), kind)
    saved = []
    for index, image in enumerate(images):
        pixels = (image.detach().cpu().float().nan_to_num().clamp(0, 1) * 255).numpy().astype(np.uint8)
        encoded = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        target = context.folders().locate(path.replace("%batch_num%", str(index)), kind=kind)
        save = partial(encoded.save, format="PNG", pnginfo=info, compress_level=compress_level)
        try:
            written = files.write_numbered(target.parent, target.name, save)
        except files.SaveError as error:
            saved_so_far = f" ({index} of {len(images)} images are saved)" if index else ""
            raise files.SaveError(f"{error}{saved_so_far}") from error
        subfolder = written.parent.relative_to(context.folders().root(kind)).as_posix()
        saved.append(
            {"filename": written.name, "subfolder": "" if subfolder == "." else subfolder, "type": kind}
        )
    return saved


class SaveImage:
    """Saves images as PNGs in the output folder, each with its workflow as metadata."""

    NODE_ID = "SaveImage"
    TITLE = "Save Image"
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_NODE = True
    FUNCTION = "save_images"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["save", "export image", "output image", "write image", "download"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "Start of the file names; may contain a subfolder (animals/fox). Replaced: %width%, %height%, "
            "%year%, %month%, %day%, %hour%, %minute%, %second%, %batch_num%."
        )
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", {"default": "ComfyUI", "tooltip": tooltip}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix):
        try:
            checked_prefix(expand_prefix(filename_prefix, 0, 0))
        except ValueError as error:
            return str(error)
        return True

    def save_images(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        texts = ({} if prompt is None else {"prompt": prompt}) | (extra_pnginfo or {})
        saved = write_images(images, filename_prefix, "output", 4, texts)
        return {"ui": {"images": saved}, "result": (images,)}


class PreviewImage:
    """Shows images without saving them; they are deleted at the next start."""

    NODE_ID = "PreviewImage"
    TITLE = "Preview Image"
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_NODE = True
    FUNCTION = "save_images"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["preview", "show image", "view image", "display image", "image viewer"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The images to show."})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images, prompt=None, extra_pnginfo=None):
        texts = ({} if prompt is None else {"prompt": prompt}) | (extra_pnginfo or {})
        prefix = f"preview_{secrets.token_hex(3)}"  # browsers cache images by name
        return {"ui": {"images": write_images(images, prefix, "temp", 1, texts)}, "result": (images,)}


class PreviewAny:
    """Shows any value as text."""

    NODE_ID = "PreviewAny"
    TITLE = "Preview as Text"
    CATEGORY = "utilities"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    FUNCTION = "main"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["show text", "show output", "inspect", "print value", "report"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"source": ("*", {"tooltip": "The value to show: text, a number, anything else."})}
        }

    def main(self, source=None):
        text = as_text(source)
        return {"ui": {"text": (text,)}, "result": (text,)}


def as_text(value: Any) -> str:
    """Strings as they are, numbers as Python formats them, other values as JSON if possible, else str()."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return str(value)
    try:
        return json.dumps(value, indent=4, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


NODES = (LoadImage, SaveImage, PreviewImage, PreviewAny)
