"""IMAGEs -> one IMAGE to compare them (flux_core/contact_sheet.py)."""

from __future__ import annotations

from ..flux_core.contact_sheet import side_by_side
from .widgets import text, wire
from .wires import from_core_image, to_core_image


class SideBySide:
    """Puts up to eight images beside each other, with a label below each, to compare them."""

    NODE_ID = "RectifluxSideBySide"
    TITLE = "Side by Side with Labels"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The sheet, to save or to preview.",)
    SEARCH_ALIASES = "compare, grid, contact sheet, stitch, label, xy plot".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        image = wire("IMAGE", "An image; those of a batch go below each other.")
        labels = text("One line for each image, from the left.")
        more = {f"image_{column}": image for column in range(2, 9)}
        return {"required": {"image_1": image, "labels": labels}, "optional": more}

    def run(
        self,
        image_1,
        labels,
        image_2=None,
        image_3=None,
        image_4=None,
        image_5=None,
        image_6=None,
        image_7=None,
        image_8=None,
    ):
        columns = (image_1, image_2, image_3, image_4, image_5, image_6, image_7, image_8)
        images = [to_core_image(image[..., :3]) for image in columns if image is not None]
        return (from_core_image(side_by_side(images, labels.splitlines())),)


NODES = (SideBySide,)
