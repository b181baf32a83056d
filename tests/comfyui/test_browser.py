"""ComfyUI's own editor in Chromium: the pack's template is opened, run and read about."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import ConsoleMessage, Page, Response, expect, sync_playwright

from .pictures import psnr
from .server import PACK, ComfyServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # milliseconds, far more than anything here takes
DEMO = json.loads((PACK / "workflows" / "text_to_image.json").read_text())
(SAVE,) = (node["id"] for node in DEMO["nodes"] if node["type"] == "SaveImage")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]


@pytest.fixture
def faults() -> list[str]:
    """What went wrong in the page and is ours, or nobody's: the editor asks for files that need not exist."""
    return []


@pytest.fixture
def page(comfy: ComfyServer, faults: list[str]) -> Iterator[Page]:
    """The demo workflow, opened as a template by a new artist."""

    def on_console(message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        if message.type == "error" and "rectiflux" in f"{message.text} {where}".lower():
            faults.append(f"console: {message.text} ({where})")

    def on_response(response: Response) -> None:
        if response.status >= 400 and "rectiflux" in response.url.lower():
            faults.append(f"{response.status}: {response.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("console", on_console)
        page.on("response", on_response)
        page.on("pageerror", lambda error: faults.append(f"page error: {error}"))
        page.goto(f"{comfy.url}/?template=text_to_image&source=rectiflux")
        page.wait_for_function(f"window.app?.graph?._nodes?.length === {len(DEMO['nodes'])}")
        yield page
        browser.close()


def test_the_template_opens_runs_and_shows_its_picture(
    comfy: ComfyServer, page: Page, faults: list[str]
) -> None:
    """The first run has the seed of the workflow file, hence paints the thumbnail."""
    unknown = (
        "app.graph._nodes.filter(node => !node.constructor.nodeData && node.type.startsWith('Rectiflux'))"
    )
    assert page.evaluate(f"{unknown}.map(node => node.type)") == []
    assert page.get_by_text(re.compile("missing node", re.IGNORECASE)).count() == 0
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"app.nodeOutputs['{SAVE}']?.images?.length === 1")
    shown = page.evaluate(f"app.nodeOutputs['{SAVE}'].images[0]")
    page.wait_for_function(f"app.graph.getNodeById({SAVE}).imgs?.[0]?.naturalWidth === 128")
    query = f"filename={shown['filename']}&type=output&subfolder={shown['subfolder']}"
    with Image.open(io.BytesIO(comfy.fetch(f"/api/view?{query}"))) as picture:
        painted = np.asarray(picture.convert("RGB"))
    with Image.open(PACK / "workflows" / "text_to_image.jpg") as thumbnail:
        assert psnr(np.asarray(thumbnail.resize((128, 128), Image.Resampling.BOX)), painted) >= 30
    assert page.evaluate("app.graph._nodes.filter(node => node.has_errors).length") == 0
    assert faults == []


def test_a_nodes_help_page_opens(page: Page, faults: list[str]) -> None:
    select = "app.canvas.selectNode(app.graph._nodes.find(node => node.type === 'RectifluxSampler'))"
    button = "document.querySelector('[data-testid=info-button]')"
    page.wait_for_function(f"() => {{ {select}; return {button} }}", polling=500)
    page.get_by_test_id("info-button").click()
    text = (PACK / "web" / "docs" / "RectifluxSampler" / "en.md").read_text()
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    expect(page.get_by_text(first[:40]).first).to_be_visible()
    assert faults == []


def test_what_a_node_refuses_is_told_in_its_words(page: Page) -> None:
    """A size that only a script can set; the editor's own field rounds it."""
    page.evaluate(
        "app.graph._nodes.find(node => node.type === 'RectifluxEmptyLatent')"
        ".widgets.find(widget => widget.name === 'width').value = 100"
    )
    page.get_by_test_id("queue-button").click()
    page.get_by_role("button", name="View details").click()
    page.get_by_role("button", name="Info for Empty FLUX Latent - width").click()
    expect(page.get_by_text("96x128 and 112x128 are near").first).to_be_visible()
