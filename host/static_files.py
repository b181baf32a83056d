"""The files of the editor's page and of the pack, read-only; a missing one is answered with a sentence."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from aiohttp import web

from .files import contained


def static_route(prefix: str, folder: Path) -> web.RouteDef:
    """GET and HEAD of the files in a folder, under a URL that starts with `prefix`; it must be added last.

    aiohttp's `add_static` answers with an empty body where a file is missing.
    """

    def find(name: str) -> Path | None:
        try:
            path = contained(folder, name)
        except (ValueError, OSError):  # outside the folder, or a name that the disk cannot have
            return None
        return path if os.path.isfile(path) else None

    async def get(request: web.Request) -> web.StreamResponse:
        path = await asyncio.to_thread(find, request.match_info["path"])
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path)

    return web.get(f"{prefix}/{{path:.*}}", get)
