"""A genuine ComfyUI with the pack in its custom_nodes, on a free port of this machine, driven over HTTP."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
START_SECONDS, RUN_SECONDS = 180, 300
OPTIONS = (
    "--cpu --disable-auto-launch --disable-api-nodes --disable-all-custom-nodes "
    "--database-url sqlite:///:memory: "
    "--preview-method latent2rgb --whitelist-custom-nodes"
).split()


class PromptFailed(Exception):
    """ComfyUI refused a prompt or failed in it: `details` is what it said."""

    def __init__(self, details: Any) -> None:
        super().__init__(json.dumps(details)[:2000])
        self.details = details


class ComfyServer:
    """One server process below `base`, where its models, inputs and outputs lie."""

    def __init__(self, checkout: Path, python: str, base: Path) -> None:
        self.base = base
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "rectiflux"
        if not link.exists():
            link.symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log_path = base / "console.txt"
        self._log = self.log_path.open("w")
        command = [python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), *OPTIONS, "rectiflux"]
        self._process = subprocess.Popen(
            command,
            cwd=checkout,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> ComfyServer:
        """Until it answers. Raises RuntimeError with its console when it ends before."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self.get("/api/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.console()[-4000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def console(self) -> str:
        return self.log_path.read_text(errors="replace")

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise PromptFailed(json.load(error)) from error

    def tell(self, path: str, body: Any) -> None:
        """Post what is answered with nothing."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()

    def interrupt(self) -> None:
        self.tell("/api/interrupt", {})

    def free(self) -> None:
        """Have it unload all models and forget all results before the next prompt."""
        self.tell("/api/free", {"unload_models": True, "free_memory": True})

    def run(self, prompt: dict[str, Any], client_id: str = "test") -> dict[str, Any]:
        """The outputs by node of one prompt. Raises PromptFailed."""
        number = self.post("/api/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.get(f"/api/history/{number}").get(number)
            if entry is not None and entry["status"]["completed"]:
                return entry["outputs"]
            if entry is not None:
                raise PromptFailed(dict(entry["status"]["messages"]).get("execution_error", entry["status"]))
            time.sleep(0.1)
        raise TimeoutError(f"the prompt did not finish:\n{self.console()[-2000:]}")

    def pictures(self, prompt: dict[str, Any], node: str) -> np.ndarray:
        """Pictures [B, H, W, 3], uint8, that a SaveImage or PreviewImage node shows after a run."""
        shown = self.run(prompt)[node]["images"]
        files = [self.fetch(f"/api/view?{urllib.parse.urlencode(image)}") for image in shown]
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
