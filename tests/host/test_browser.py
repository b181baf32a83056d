"""The editor in a real browser: Chromium opens what `run.py serve` serves, and uses its buttons.

One server and one page for the file; every test but the first starts with the demo workflow reloaded.
RECTIFLUX_SCREENSHOT=PATH saves a screenshot of the editor after the first run.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, WebSocket, expect, sync_playwright
from rectiflux.host.files import Folders
from rectiflux.host.render import render

from .command import PATIENCE, ROOT, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DEMO = json.loads((ROOT / "workflows" / "text_to_image.json").read_text())
(STEPS,) = (node["widgets_values"][0] for node in DEMO["nodes"] if node["type"] == "RectifluxSchedule")
FEW = 4  # steps
expect.set_options(timeout=PATIENCE * 1000)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]


def node_id(kind: str) -> str:
    """The id of the demo's only node of a class."""
    (found,) = (str(node["id"]) for node in DEMO["nodes"] if node["type"] == kind)
    return found


PROMPT, SEED, SCHEDULE = (node_id(f"Rectiflux{name}") for name in ("TextEncode", "Noise", "Schedule"))
LATENT, SAMPLER, DECODE = (node_id(f"Rectiflux{name}") for name in ("EmptyLatent", "Sampler", "VAEDecode"))
SAVE, ENCODERS = node_id("SaveImage"), node_id("RectifluxTextEncoderLoader")


class Editor:
    """The page, the messages of its WebSocket, and its errors (`faults`)."""

    def __init__(self, page: Page, address: str, data: Path) -> None:
        self.page = page
        self.address = address
        self.data = data
        self.heard: list[dict[str, Any]] = []
        self.previews: list[tuple[dict[str, Any], Image.Image]] = []
        self.faults: list[str] = []
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(f"page error: {error}"))
        page.on("request", self._on_request)
        page.on("websocket", self._on_socket)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", f"blob:{self.address}")):
            self.faults.append(f"a request to another machine: {request.url}")

    def _on_socket(self, socket: WebSocket) -> None:
        socket.on("framereceived", self._on_frame)

    def _on_frame(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            self.heard.append(json.loads(frame))
        elif struct.unpack(">I", frame[:4])[0] == 4:
            end = 8 + struct.unpack(">I", frame[4:8])[0]
            self.previews.append((json.loads(frame[8:end]), Image.open(io.BytesIO(frame[end:]))))

    def wait(self, happened: Callable[[], Any], what: str) -> Any:
        """Let the browser run until `happened` returns something true; returns that."""
        deadline = time.monotonic() + PATIENCE
        while not (found := happened()):
            assert time.monotonic() < deadline, f"timeout while waiting for {what}"
            self.page.wait_for_timeout(20)
        return found

    def received(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of one kind since the last `press_run`."""
        return [message["data"] for message in self.heard if message["type"] == kind]

    def show_demo(self) -> None:
        """The shipped demo workflow with a fixed seed and few steps."""
        self.page.evaluate("graph => app.loadGraphData(graph)", DEMO)
        self.set(SEED, control_after_generate="fixed")
        self.set(SCHEDULE, steps=FEW)

    def set(self, number: str, **values: Any) -> None:
        """Set widget values, also ones that the editor's controls would not allow."""
        script = "([id, values]) => app.graph.getNodeById(id).widgets.forEach(widget => {"
        script += " if (widget.name in values) widget.value = values[widget.name] })"
        self.page.evaluate(script, [int(number), values])

    def expect_fault(self, pattern: str) -> None:
        """Remove the faults of a test; each must match."""
        assert self.faults and all(re.search(pattern, fault) for fault in self.faults), self.faults
        self.faults.clear()

    def node(self, number: str) -> Locator:
        return self.page.locator(f"[data-node-id='{number}']")

    def press_run(self) -> None:
        self.heard.clear()
        self.previews.clear()
        self.page.get_by_test_id("queue-button").click()

    def run(self) -> list[str]:
        """Press Run and wait for the end; returns the nodes that ran."""
        self.press_run()
        self.wait(lambda: None in [data["node"] for data in self.received("executing")], "the end")
        return [data["node"] for data in self.received("executing") if data["node"] is not None]

    def shown_image(self) -> Image.Image:
        """What the Save Image node shows, in its own size; waits until it is the last saved image."""
        name = max(path.name for path in (self.data / "output").glob("*.png"))
        shown = self.node(SAVE).locator(f"img[src*='{name}']")
        expect(shown).to_be_visible()
        script = """async image => {
            await image.decode()
            const [width, height] = [image.naturalWidth, image.naturalHeight]
            const canvas = new OffscreenCanvas(width, height).getContext('2d')
            canvas.drawImage(image, 0, 0)
            return [width, height, [...canvas.getImageData(0, 0, width, height).data]] }"""
        width, height, pixels = shown.evaluate(script)
        return Image.frombytes("RGBA", (width, height), bytes(pixels)).convert("RGB")

    def saved(self) -> list[Image.Image]:
        """The saved images, oldest first."""
        images = [Image.open(path) for path in sorted((self.data / "output").glob("*.png"))]
        for image in images:
            image.load()  # which also closes the file
        return images


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, data folder) of an editor started from the command line."""
    folder = tmp_path_factory.mktemp("editor")
    with serving(folder) as (address, _):
        yield address, folder / "data"


@pytest.fixture(scope="module")
def opened(served: tuple[str, Path]) -> Iterator[Editor]:
    """A new browser profile at the editor's address."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tabs = browser.new_context(viewport={"width": 1600, "height": 900})
        editor = Editor(tabs.new_page(), *served)
        editor.page.goto(editor.address)
        editor.page.wait_for_function("window.app?.graph?.nodes.length > 1")
        yield editor
        browser.close()


@pytest.fixture
def editor(opened: Editor) -> Iterator[Editor]:
    """The page with the demo; at the end every fault must have been expected by the test."""
    opened.page.keyboard.press("Escape")
    opened.show_demo()
    yield opened
    faults, opened.faults = opened.faults, []
    assert faults == []


def test_the_first_visit_shows_the_demo_and_run_saves_an_image(opened: Editor) -> None:
    page = opened.page
    shown = page.evaluate("app.graph.nodes.map(node => [String(node.id), node.type])")
    assert sorted(shown) == sorted([str(node["id"]), node["type"]] for node in DEMO["nodes"])
    titles = [opened.node(number).get_by_test_id("node-title").inner_text() for number in (PROMPT, SAMPLER)]
    assert titles == ["FLUX Prompt", "FLUX Sampler"]
    expect(page.get_by_role("dialog")).to_have_count(0)

    ran = opened.run()
    assert sorted(ran, key=int) == [str(number) for number in range(1, 13)]
    states = [
        data["nodes"][SAMPLER] for data in opened.received("progress_state") if SAMPLER in data["nodes"]
    ]
    steps = [state["value"] for state in states if state["state"] == "running"]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == STEPS and len(steps) > 2
    where, preview = opened.previews[-1]
    assert (where["node_id"], preview.format, preview.size) == (SAMPLER, "JPEG", (128, 128))
    expect(opened.node(SAMPLER).locator("img")).to_be_visible()

    (saved,) = opened.saved()
    shown_image = opened.shown_image()
    assert shown_image.size == (128, 128) and shown_image.tobytes() == saved.convert("RGB").tobytes()
    assert json.loads(saved.info["workflow"])["nodes"] and json.loads(saved.info["prompt"])
    assert opened.faults == []
    if target := os.environ.get("RECTIFLUX_SCREENSHOT"):
        expect(page.get_by_test_id("queue-notification-banner")).to_be_hidden()
        page.screenshot(path=target)


def test_a_rerun_executes_only_changed_nodes_and_those_behind_them(editor: Editor) -> None:
    editor.run()
    assert editor.run() == []
    editor.node(PROMPT).locator("textarea").first.fill("a small blue star")
    assert editor.run() == [PROMPT, SAMPLER, DECODE, SAVE]
    assert editor.shown_image().tobytes() == editor.saved()[-1].convert("RGB").tobytes()


def test_an_older_file_gets_the_report_output_and_a_text_preview_shows_it(editor: Editor) -> None:
    """The sampler saved with one output, and a wire from the second."""
    old = json.loads(json.dumps(DEMO))
    for node in old["nodes"]:
        node["outputs"] = node["outputs"][:1] if str(node["id"]) == SAMPLER else node["outputs"]
    editor.page.evaluate("graph => app.loadGraphData(graph)", old)
    editor.set(SCHEDULE, steps=FEW)
    outputs = f"app.graph.getNodeById({SAMPLER}).outputs.map(slot => [slot.name, slot.type])"
    assert editor.page.evaluate(outputs) == [["latent", "LATENT"], ["report", "STRING"]]
    add = "const node = LiteGraph.createNode('PreviewAny'); app.graph.add(node); node.pos = [40, 900]"
    wire = f"app.graph.getNodeById({SAMPLER}).connect(1, node, 0)"
    number = str(editor.page.evaluate(f"() => {{ {add}; {wire}; return node.id }}"))
    assert number in editor.run()
    values = f"app.graph.getNodeById({number}).widgets.map(widget => widget.value)"
    shown = editor.wait(
        lambda: [text for text in editor.page.evaluate(values) if "solver: euler" in str(text)], "the report"
    )
    assert f"\nsteps: {FEW}\nevaluations of the model: {FEW}\n" in shown[0]
    (output,) = (data["output"] for data in editor.received("executed") if data["node"] == number)
    assert output["text"] == [shown[0]]


def test_an_error_is_shown_on_its_node(editor: Editor) -> None:
    editor.set(SCHEDULE, steps=100000)
    editor.press_run()
    overlay = editor.page.get_by_test_id("error-overlay")
    expect(overlay).to_contain_text("100000")
    expect(overlay).to_contain_text("1000.")
    expect(editor.node(SCHEDULE).locator(".ring-destructive")).to_be_visible()
    editor.expect_fault(r"status of 400 .*/api/prompt|PromptExecutionError")
    console = editor.page.get_by_role("button", name="Toggle Bottom Panel").first
    console.click()
    expect(editor.page.locator(".xterm-rows")).to_contain_text("steps must be at most 1000, got 100000")
    console.click()
    editor.set(SCHEDULE, steps=2)
    editor.set(ENCODERS, clip_name="rectiflux-mini-t5.safetensors")
    editor.run()
    expect(overlay).to_contain_text("rectiflux-mini-t5.safetensors")
    expect(editor.node(ENCODERS).locator(".ring-destructive")).to_be_visible()
    expect(editor.node(SCHEDULE).locator(".ring-destructive")).to_have_count(0)


def test_a_saved_workflow_is_restored_after_a_reload(editor: Editor) -> None:
    editor.set(PROMPT, prompt="a purple cross")
    editor.page.keyboard.press("Control+s")
    dialog = editor.page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill("my cross")
    dialog.get_by_role("button", name="Confirm").click()
    expect(dialog).to_have_count(0)
    path = editor.data / "user" / "workflows" / "my cross.json"
    editor.wait(path.exists, "the saved workflow")
    assert "a purple cross" in path.read_text()
    editor.page.goto(editor.address)
    values = "app.graph.nodes.flatMap(node => (node.widgets ?? []).map(widget => widget.value))"
    editor.page.wait_for_function(f"window.app?.graph && {values}.includes('a purple cross')")
    expect(editor.page.get_by_test_id("workflow-tab").filter(has_text="my cross")).to_be_visible()
    editor.page.get_by_role("button", name="Workflows").click()
    expect(editor.page.get_by_role("treeitem").filter(has_text="my cross").first).to_be_visible()
    editor.page.get_by_role("button", name="Workflows").click()


def test_a_run_can_be_stopped(editor: Editor) -> None:
    editor.set(LATENT, width=512, height=512)
    editor.set(SCHEDULE, steps=1000)
    editor.press_run()
    editor.wait(lambda: editor.previews, "the first preview")
    editor.page.get_by_role("button", name="Cancel current run").first.click()
    editor.wait(lambda: editor.received("execution_interrupted"), "the interruption")
    editor.show_demo()
    assert SAVE in editor.run()


def test_templates_and_jobs_are_listed(editor: Editor) -> None:
    editor.page.get_by_role("button", name="Templates").click()
    dialog = editor.page.get_by_role("dialog")
    expect(dialog.get_by_test_id("template-workflow-text_to_image")).to_be_visible()
    expect(dialog.get_by_text("rectiflux", exact=True)).to_be_visible()
    editor.page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    editor.set(PROMPT, prompt="a small pink circle")
    editor.run()
    editor.page.get_by_test_id("queue-overlay-toggle").click()
    name = max(path.name for path in (editor.data / "output").glob("*.png"))
    expect(editor.page.get_by_test_id("job-assets-list").locator(f"img[src*='{name}']")).to_be_visible()
    editor.page.get_by_test_id("queue-overlay-toggle").click()


def test_the_help_page_of_a_node(editor: Editor) -> None:
    editor.page.get_by_test_id(f"node-header-{SAMPLER}").click()
    editor.page.get_by_test_id("info-button").click()
    text = (ROOT / "web" / "docs" / "RectifluxSampler" / "en.md").read_text()
    first = re.sub(r"[*`]", "", next(line for line in text.splitlines() if line and not line.startswith("#")))
    expect(editor.page.locator("body")).to_contain_text(first[:40])


def test_a_duplicated_tab_and_its_original_stay_connected(editor: Editor) -> None:
    """A duplicated tab has its original's window.name, and with it the client id."""
    client_id = editor.page.evaluate("window.name")
    copy = Editor(editor.page.context.new_page(), editor.address, editor.data)
    copy.page.add_init_script(f"window.name = {client_id!r}")
    sockets: list[str] = []
    for page in (editor.page, copy.page):
        page.on("websocket", lambda socket: sockets.append(socket.url))
    copy.page.goto(editor.address)
    copy.page.wait_for_function("window.app?.graph?.nodes.length > 1")
    copy.page.wait_for_timeout(2000)  # each would connect again 0.3 s after its connection was closed
    assert len(sockets) == 1 and client_id in sockets[0]
    copy.show_demo()
    editor.heard.clear()
    assert SAVE in copy.run()
    editor.wait(lambda: editor.received("execution_success"), "the message in the other tab")
    assert len(sockets) == 1 and copy.faults == []
    copy.page.close()


DROP = """([name, letters]) => {
    const bytes = Uint8Array.from(atob(letters), letter => letter.charCodeAt(0))
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([bytes], name, {type: 'image/png'}))
    const options = {clientX: 800, clientY: 800, bubbles: true, cancelable: true, dataTransfer}
    for (const kind of ['dragenter', 'dragover', 'drop'])
        document.getElementById('graph-canvas').dispatchEvent(new DragEvent(kind, options)) }"""


def drop_rendered(editor: Editor, folder: Path, seed: int) -> Image.Image:
    """An image by `run.py render` with this seed; its file is dropped on the editor's empty graph."""
    settings = [f"seed={seed}", f"steps={FEW}", "prompt=a small green star"]
    assert render(ROOT / "workflows" / "text_to_image.json", Folders.under(folder), settings).error is None
    (path,) = (folder / "output").glob("*.png")
    editor.page.evaluate("app.graph.clear()")
    editor.page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
    editor.page.wait_for_function("app.graph.nodes.some(node => node.type === 'SaveImage')")
    with Image.open(path) as image:
        return image.convert("RGB")


def test_the_image_of_the_largest_exact_seed_dropped_on_the_editor(editor: Editor, tmp_path: Path) -> None:
    rendered = drop_rendered(editor, tmp_path, 2**53 - 1)
    editor.run()
    assert editor.saved()[-1].convert("RGB").tobytes() == rendered.tobytes()


def test_an_image_whose_seed_a_browser_rounds_is_refused_with_the_limit(
    editor: Editor, tmp_path: Path
) -> None:
    """JavaScript makes 2^64 of 2^64 - 1; what cannot be the same image does not run."""
    drop_rendered(editor, tmp_path, 2**64 - 1)
    with editor.page.expect_response(f"{editor.address}api/prompt") as refused:
        editor.press_run()
    assert "choose one up to 9007199254740991" in refused.value.text()
    overlay = editor.page.get_by_test_id("error-overlay")
    expect(overlay).to_contain_text("Noise from Seed rejected the value for seed")
    console = editor.page.get_by_role("button", name="Toggle Bottom Panel").first
    console.click()
    expect(editor.page.locator(".xterm-rows")).to_contain_text(
        "9007199254740991, which browsers keep exactly"
    )
    console.click()
    assert editor.received("executing") == []
    editor.expect_fault(r"status of 400 .*/api/prompt|PromptExecutionError")


def test_a_link_on_another_site_opens_the_editor(editor: Editor) -> None:
    page = editor.page.context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    link = f'<a href="{editor.address}?template=text_to_image&source=rectiflux">editor</a>'
    page.route("http://wiki.example/", lambda route: route.fulfill(body=link, content_type="text/html"))
    page.goto("http://wiki.example/")
    with page.expect_response(lambda response: response.url.startswith(f"{editor.address}?")) as opened:
        page.get_by_role("link").click()
    assert opened.value.status == 200
    page.wait_for_function("window.app?.graph?.nodes.length > 1")
    page.close()
