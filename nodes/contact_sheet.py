"""IMAGEs -> one IMAGE to compare them. The drawing is flux_core/contact_sheet.py."""

from __future__ import annotations

from ..flux_core.contact_sheet import side_by_side
from .wires import from_core_image, to_core_image


class SideBySide:
    """Puts up to eight pictures beside each other, with a label below each, to compare them."""

    NODE_ID = "RectifluxSideBySide"
    TITLE = "Side by Side with Labels"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The sheet, to save or to look at.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["compare", "grid", "contact sheet", "stitch", "label", "xy plot"]

    @classmethod
    def INPUT_TYPES(cls):
        image = {"tooltip": "A picture; those of a batch stand below each other."}
        labels = {"default": "", "multiline": True, "tooltip": "One line for each picture, from the left."}
        more = {f"image_{number}": ("IMAGE", image) for number in range(2, 9)}
        return {"required": {"image_1": ("IMAGE", image), "labels": ("STRING", labels)}, "optional": more}

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
        given = (image_1, image_2, image_3, image_4, image_5, image_6, image_7, image_8)
        images = [to_core_image(image[..., :3]) for image in given if image is not None]
        return (from_core_image(side_by_side(images, labels.splitlines())),)


NODES = (SideBySide,)
