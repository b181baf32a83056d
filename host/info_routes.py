"""The server's routes that describe what it has: node definitions, templates, the log, the system."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from .guard import Handler
from .json_writer import json_response
from .registry import PACK_NAME, Registry
from .sockets import FEATURES, Console

LANGUAGES = ("en", "ar", "es", "fa", "fr", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW")
NO_GENERIC_ERRORS = {
    "errorCatalog": {"runtimeErrors": {"execution_failed": {"message": None, "toastMessage": None}}}
}
"""Translations without the editor's generic text on a failed node, so that it shows the node's message."""
CONSTANT_ANSWERS: dict[str, Any] = {
    "/users": {"storage": "server", "migrated": True},
    "/features": FEATURES,
    "/i18n": dict.fromkeys(LANGUAGES, NO_GENERIC_ERRORS),
    "/internal/logs": "",
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/experiment/models": [],
    "/embeddings": [],
    "/templates/{name}": [],
}
"""{path: its constant JSON answer}; the empty ones are features that this host does not have."""


class InfoRoutes:
    """Handlers over the registry, the pack's web/ and workflows/ folders, and the log."""

    def __init__(self, registry: Registry, pack: Path, console: Console) -> None:
        self.registry = registry
        self.pack = pack
        self.console = console

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.get("/object_info", self.object_info),
            web.get("/object_info/{id}", self.object_info),
            web.get("/extensions", self.extensions),
            web.get("/workflow_templates", self.templates),
            web.get(f"/workflow_templates/{PACK_NAME}/{{name}}", self.template),
            web.get("/internal/logs/raw", self.logs),
            web.patch("/internal/logs/subscribe", constant(None)),  # every editor receives the log
            web.get("/system_stats", self.system_stats),
            *(web.get(path, constant(value)) for path, value in CONSTANT_ANSWERS.items()),
        ]

    async def object_info(self, request: web.Request) -> web.Response:
        """The description of all node classes, or of one."""
        class_type = request.match_info.get("id")
        if class_type is None:
            return json_response(await asyncio.to_thread(self.registry.object_info))
        known = class_type in self.registry
        return json_response({class_type: self.registry.describe(class_type)} if known else {})

    async def extensions(self, request: web.Request) -> web.Response:
        """Paths of the pack's scripts; the frontend imports each."""
        web_folder = self.pack / "web"
        scripts = sorted(path.relative_to(web_folder).as_posix() for path in web_folder.rglob("*.js"))
        return json_response([f"/extensions/{PACK_NAME}/{script}" for script in scripts])

    async def templates(self, request: web.Request) -> web.Response:
        """Names of the shipped workflows."""
        names = sorted(path.stem for path in (self.pack / "workflows").glob("*.json"))
        return json_response({PACK_NAME: names} if names else {})

    async def template(self, request: web.Request) -> web.StreamResponse:
        """A shipped workflow or its image."""
        path = self.pack / "workflows" / Path(request.match_info["name"]).name
        if path.suffix not in (".json", ".jpg") or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    async def logs(self, request: web.Request) -> web.Response:
        """The last lines of the log."""
        size = {"cols": 80, "rows": 24}  # the editor expects a terminal's size
        return json_response({"entries": list(self.console.entries), "size": size})

    async def system_stats(self, request: web.Request) -> web.Response:
        """Versions, memory and devices."""
        total, free = _memory()
        system = {
            "os": platform.system().lower(),
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": f"none (embedded editor of {PACK_NAME})",
            "python_version": sys.version,
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            "argv": sys.argv,
        }
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        devices = [
            _device(name, "cuda", index, *torch.cuda.mem_get_info(index)[::-1])
            for index, name in enumerate(names)
        ]
        return json_response(
            {"system": system, "devices": devices or [_device("cpu", "cpu", 0, total, free)]}
        )


def constant(value: Any) -> Handler:
    """A handler that always answers with the same JSON."""

    async def handler(request: web.Request) -> web.Response:
        return json_response(value)

    return handler


def _memory() -> tuple[int, int]:
    """(total, free) bytes of main memory, 0 where the system does not report them."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def _device(name: str, kind: str, index: int, total: int, free: int) -> dict[str, Any]:
    memory = {"vram_total": total, "vram_free": free, "torch_vram_total": 0, "torch_vram_free": 0}
    return {"name": name, "type": kind, "index": index, **memory}
