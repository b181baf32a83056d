"""The web application: serves the editor's frontend, accepts prompts, and sends their events to open editors.

What the frontend requests was observed from outside (comfyui-frontend-package 1.58) and read in ComfyUI's
server.py (0.33); the code is our own. One asyncio loop serves; the worker thread of jobs.py runs prompts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

from .execution import Executor
from .file_routes import UPLOAD_LIMIT, FileRoutes
from .files import PACK
from .guard import Hosts, guard, set_headers
from .info_routes import InfoRoutes
from .jobs import Job, Jobs
from .queue_routes import QueueRoutes
from .registry import PACK_NAME, Registry
from .request_reading import explain_errors, read_body
from .sockets import Console, Sockets, notice_frame, preview_frame
from .static_files import static_route

log = logging.getLogger(__name__)
PACK_LOG = logging.getLogger(__name__.partition(".")[0])

DEMO = "text_to_image"


class Server:
    """The application over a registry of nodes.

    `frontend`: the static files of the editor. `pack`: a folder with web/ and workflows/. `upload_limit`:
    bytes of one request.
    """

    def __init__(
        self, registry: Registry, frontend: Path, pack: Path = PACK, upload_limit: int = UPLOAD_LIMIT
    ) -> None:
        self.registry = registry
        self.frontend = frontend
        self.pack = pack
        self.upload_limit = upload_limit
        self.sockets = Sockets()
        self.console = Console(self.sockets.send)
        self.jobs = Jobs(Executor(registry), self._on_event, self._on_change)
        self.files = FileRoutes(registry.folders)

    def app(self, loopback: bool = True, allowed_hosts: Iterable[str] = ()) -> web.Application:
        """The application; it starts and ends the worker; connections.Runner runs it.

        `loopback`: refuse other machines' requests. `allowed_hosts`: more host names under which it is known.
        """
        middlewares = [explain_errors, guard(Hosts(loopback, allowed_hosts)), read_body]
        app = web.Application(middlewares=middlewares, client_max_size=self.upload_limit)
        routes = [
            *QueueRoutes(self.registry, self.jobs).routes(),
            *InfoRoutes(self.registry, self.pack, self.console).routes(),
            *self.files.routes(),
        ]
        app.add_routes(routes)
        app.add_routes([_under_api(route) for route in routes])
        app.add_routes([web.get("/", self.index), web.get("/ws", self.websocket)])
        app.add_routes([static_route(f"/extensions/{PACK_NAME}", self.pack / "web")])
        app.add_routes([static_route("", self.frontend)])
        app.on_response_prepare.append(set_headers)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self.sockets.close)
        app.on_cleanup.append(self._stop)
        return app

    async def _start(self, app: web.Application) -> None:
        PACK_LOG.addHandler(self.console)
        self.jobs.start()

    async def _stop(self, app: web.Application) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.jobs.close)
        PACK_LOG.removeHandler(self.console)

    async def index(self, request: web.Request) -> web.StreamResponse:
        """The editor. On its first visit a browser is redirected to the demo workflow.

        Later the editor restores its tabs from the browser's storage, unless its settings disable that; with
        nothing to restore it would show ComfyUI's default workflow, whose nodes are missing here.
        """
        seen = f"{PACK_NAME}_{request.url.port}"  # cookies are shared between ports, storage is not
        restores = self.files.settings().get("Comfy.Workflow.Persist", True)
        demo = self.pack / "workflows" / f"{DEMO}.json"
        if request.query_string or (restores and seen in request.cookies) or not demo.is_file():
            return web.FileResponse(self.frontend / "index.html")
        redirect = web.HTTPFound(f"/?template={DEMO}&source={PACK_NAME}")
        redirect.set_cookie(seen, "1", max_age=10 * 365 * 86400, httponly=True, samesite="Lax")
        raise redirect

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        """An editor's WebSocket."""
        if not web.WebSocketResponse().can_prepare(request):
            raise web.HTTPBadRequest(text="this address is for WebSocket connections; open the editor's page")
        return await self.sockets.serve(request, self._greeting)

    def _greeting(self, client_id: str) -> list[dict[str, Any]]:
        """The first messages to an editor: the queue's length, and the node that runs for it."""
        messages = [self._status(client_id)]
        for job in self.jobs.listed(("in_progress",)):
            if job.client_id == client_id and job.node is not None:
                data = {"node": job.node, "display_node": job.node, "prompt_id": job.id}
                messages.append({"type": "executing", "data": data})
        return messages

    def _status(self, client_id: str | None = None) -> dict[str, Any]:
        status = {"exec_info": {"queue_remaining": self.jobs.remaining()}}
        return {"type": "status", "data": {"status": status} | ({"sid": client_id} if client_id else {})}

    def _on_change(self) -> None:
        self.sockets.send(self._status())

    def _on_event(self, job: Job, kind: str, data: dict[str, Any]) -> None:
        make_frame = {"preview": preview_frame, "notice": notice_frame}.get(kind)
        try:
            message = make_frame(data) if make_frame else {"type": kind, "data": data}
        except Exception:  # the image itself is saved all the same
            log.exception("the %s of node %s cannot be shown", kind, data.get("node_id"))
            return
        self.sockets.send(message, job.client_id)


def _under_api(route: web.RouteDef) -> web.RouteDef:
    return web.RouteDef(route.method, f"/api{route.path}", route.handler, route.kwargs)
