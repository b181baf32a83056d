"""The server's routes that read and write files: saved workflows, settings, and those of image_routes.py.

Every path in a request is checked to stay in its folder (files.contained); every file is written atomically
(files.write).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from ..flux_core.weights.file_names import walk_visible
from . import unfinished
from .files import Folders, contained, reporting, write
from .image_routes import ImageRoutes
from .json_reader import read_json
from .request_reading import json_body, json_object

log = logging.getLogger(__name__)

UPLOAD_LIMIT = 100 * 2**20  # bytes of one request
CONTENT_TYPES = {".json": "application/json", ".css": "text/css"}
"""Media types of user files; all others are sent as bytes, so that none is run as a page or script."""
INITIAL_FILES = {"user.css": b"", "comfy.templates.json": b"[]", "workflows/.index.json": b"{}"}
"""User files that the editor requests at its start, as they are before it writes them."""
DEFAULTS = {
    "Comfy.Notification.ShowVersionUpdates": False,  # no requests to api.comfy.org
    "Comfy.VueNodes.Enabled": True,  # images as large as their node
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text also when the whole graph is in view
    "Comfy.Minimap.Visible": False,  # it covers a part of small graphs
    "Comfy.Graph.CanvasInfo": False,  # a frame counter in the corner
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",  # the pack's name on every node
}
"""Our default settings, where they differ from the editor's."""


class FileRoutes:
    """Handlers over the host's folders."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.images = ImageRoutes(folders)
        self.settings_file = folders.user / "comfy.settings.json"

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            *self.images.routes(),
            web.get("/{file:user.css}", self.read_user_file),
            web.get("/userdata", self.list_user_files),
            web.post("/userdata/{file:.+}/move/{target:.+}", self.move_user_file),
            web.get("/userdata/{file:.+}", self.read_user_file),
            web.post("/userdata/{file:.+}", self.write_user_file),
            web.delete("/userdata/{file:.+}", self.delete_user_file),
            web.get("/settings", self.read_settings),
            web.post("/settings", self.write_settings),
            web.get("/settings/{name:.+}", self.read_setting),
            web.post("/settings/{name:.+}", self.write_setting),
        ]

    # Saved workflows and other files of the user

    def _user_path(self, name: str) -> Path:
        return contained(self.folders.user, name)

    def _user_file(self, request: web.Request) -> Path:
        path = self._user_path(request.match_info["file"])
        if not path.is_file():
            raise web.HTTPNotFound
        return path

    def _describe(self, request: web.Request, path: Path) -> web.Response:
        """The name of a file; with `full_info` also its size and times."""
        entry = _entry(self.folders.user, path)
        return web.json_response(entry if request.query.get("full_info") == "true" else entry["path"])

    async def list_user_files(self, request: web.Request) -> web.Response:
        """The files in the folder `dir`: their names, or descriptions with `full_info`."""
        query = request.query
        root = self._user_path(query.get("dir", ""))
        entries = [_entry(root, path) for path in _files_in(root, query.get("recurse") == "true")]
        if query.get("full_info") == "true":
            return web.json_response(entries)
        names = [entry["path"] for entry in entries]
        split = query.get("split") == "true"
        return web.json_response([[name, *name.split("/")] for name in names] if split else names)

    async def read_user_file(self, request: web.Request) -> web.StreamResponse:
        """A user file."""
        name = request.match_info["file"]
        kind = CONTENT_TYPES.get(Path(name).suffix.lower(), "application/octet-stream")
        if name in INITIAL_FILES and not self._user_path(name).is_file():
            return web.Response(body=INITIAL_FILES[name], content_type=kind)
        return web.FileResponse(self._user_file(request), headers={"Content-Type": kind})

    async def write_user_file(self, request: web.Request) -> web.Response:
        """Write a user file; 409 if it exists and `overwrite` is false."""
        path = self._user_path(request.match_info["file"])
        if request.query.get("overwrite") == "false" and path.exists():
            raise web.HTTPConflict(text=f"the file {path.name} exists already")
        write(path, await request.read())
        return self._describe(request, path)

    async def delete_user_file(self, request: web.Request) -> web.Response:
        """Delete a user file."""
        path = self._user_file(request)
        with reporting(path):
            path.unlink()
        return web.Response(status=204)

    async def move_user_file(self, request: web.Request) -> web.Response:
        """Move a user file; 409 if the target exists, unless `overwrite` is true."""
        path, target = self._user_file(request), self._user_path(request.match_info["target"])
        if request.query.get("overwrite") != "true" and target.exists():
            raise web.HTTPConflict(text=f"the file {target.name} exists already")
        with reporting(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return self._describe(request, target)

    # Settings

    def settings(self) -> dict[str, Any]:
        """The saved settings; a damaged file is renamed and replaced by empty settings."""
        try:
            found = read_json(self.settings_file.read_bytes())
            if isinstance(found, dict):
                return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("the settings in %s cannot be read (%s)", self.settings_file, error)
        with suppress(OSError):  # on a read-only disk it stays, and the page opens without settings
            os.replace(self.settings_file, self.settings_file.with_suffix(".damaged"))
        return {}

    async def _change_settings(self, changes: dict[str, Any]) -> web.Response:
        await asyncio.to_thread(self.merge_settings, changes)
        return web.Response()

    def merge_settings(self, changes: dict[str, Any]) -> None:
        """Write the saved settings with the changes; another host on the same folder waits meanwhile."""
        with reporting(self.settings_file), unfinished.locked(self.settings_file.with_suffix(".lock")):
            text = json.dumps(self.settings() | changes, indent=2, ensure_ascii=False)
            write(self.settings_file, text.encode())

    async def read_settings(self, request: web.Request) -> web.Response:
        """All settings."""
        return web.json_response(DEFAULTS | self.settings())

    async def read_setting(self, request: web.Request) -> web.Response:
        """One setting."""
        return web.json_response((DEFAULTS | self.settings()).get(request.match_info["name"]))

    async def write_settings(self, request: web.Request) -> web.Response:
        """Change several settings."""
        return await self._change_settings(await json_object(request))

    async def write_setting(self, request: web.Request) -> web.Response:
        """Change one setting."""
        return await self._change_settings({request.match_info["name"]: await json_body(request)})


def _files_in(root: Path, recurse: bool) -> list[Path]:
    """The visible files in a folder, with `recurse` also below it, sorted; links are followed."""
    found: list[Path] = []
    for place, folders, files in walk_visible(root):
        found += [place / name for name in files]
        if not recurse:
            folders.clear()
    return sorted(found)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    stat = path.stat()
    times = {"modified": int(stat.st_mtime * 1000), "created": int(stat.st_ctime * 1000)}
    return {"path": path.relative_to(root).as_posix(), "size": stat.st_size, **times}
