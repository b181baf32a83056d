"""The web server: serves the editor's frontend, takes prompts, and tells every open editor how they go.

What the frontend asks for was observed from outside (comfyui-frontend-package 1.58) and read in ComfyUI's
server.py (0.33); the code is our own. One asyncio loop serves; the worker thread of jobs.py runs graphs.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib.util
import json
import logging
import os
import platform
import signal
import sys
import uuid
import webbrowser
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from .arguments import Parser, port_number
from .execution import Executor
from .files import PACK, Folders, SaveError
from .guard import Handler, explain_errors, guard, is_loopback
from .jobs import ACTIVE, Job, Jobs
from .registry import PACK_NAME, Registry
from .sockets import FEATURES, Console, Sockets, notice_frame, preview_frame
from .storage import UPLOAD_LIMIT, Storage
from .validation import InvalidPrompt, validate

log = logging.getLogger(__name__)
PACK_LOG = logging.getLogger(__name__.partition(".")[0])

DEMO = "text_to_image"
LANGUAGES = ("en", "ar", "es", "fa", "fr", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW")
OWN_WORDS = {"errorCatalog": {"runtimeErrors": {"execution_failed": {"message": None, "toastMessage": None}}}}
"""The editor without its general words on a failed node; it then shows the node's own sentence."""
FIXED: dict[str, Any] = {
    "/users": {"storage": "server", "migrated": True},
    "/features": FEATURES,
    "/i18n": dict.fromkeys(LANGUAGES, OWN_WORDS),
    "/internal/logs": "",
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/experiment/models": [],
    "/embeddings": [],
}
"""What is always answered the same; the empty ones, because this host has no such things."""


class Server:
    """The routes, over a registry of nodes; `pack` has the folders web/ and workflows/."""

    def __init__(self, registry: Registry, frontend: Path, pack: Path = PACK) -> None:
        self.registry = registry
        self.frontend = frontend
        self.pack = pack
        self.storage = Storage(registry.folders)
        self.sockets = Sockets()
        self.console = Console(self.sockets.tell)
        self.jobs = Jobs(Executor(registry), self._on_event, self._on_change)

    def app(self, loopback: bool = True) -> web.Application:
        """The application, which starts and ends the worker. `loopback`: it answers to this machine only."""
        app = web.Application(middlewares=[guard(loopback), explain_errors], client_max_size=UPLOAD_LIMIT)
        routes = [*self.routes(), *self.storage.routes()]
        app.add_routes(routes)
        app.add_routes([_under_api(route) for route in routes])
        app.add_routes([web.get("/", self.index), web.get("/ws", self.websocket)])
        for prefix, folder in ((f"/extensions/{PACK_NAME}", self.pack / "web"), ("/", self.frontend)):
            if folder.is_dir():
                app.router.add_static(prefix, folder)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self.sockets.close)
        app.on_cleanup.append(self._stop)
        return app

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/prompt", self.queue_length),
            web.post("/prompt", self.submit),
            web.get("/queue", self.queue),
            web.post("/queue", self.change_queue),
            web.get("/history", self.history),
            web.get("/history/{id}", self.history),
            web.post("/history", self.change_history),
            web.get("/jobs", self.list_jobs),
            web.get("/jobs/{id}", self.show_job),
            web.post("/jobs/cancel", self.cancel_jobs),
            web.post("/jobs/{id}/cancel", self.cancel_job),
            web.post("/interrupt", self.interrupt),
            web.post("/free", self.free),
            web.get("/object_info", self.object_info),
            web.get("/object_info/{id}", self.object_info),
            web.get("/extensions", self.extensions),
            web.get("/workflow_templates", self.templates),
            web.get(f"/workflow_templates/{PACK_NAME}/{{name}}", self.template),
            web.get("/templates/{name}", answer([])),
            web.get("/internal/logs/raw", self.logs),
            web.patch("/internal/logs/subscribe", answer(None)),  # all editors are told
            web.get("/{file:user.css}", self.storage.read_user_file),
            web.get("/system_stats", self.system_stats),
            *(web.get(path, answer(value)) for path, value in FIXED.items()),
        ]

    async def _start(self, app: web.Application) -> None:
        PACK_LOG.addHandler(self.console)
        self.jobs.start()

    async def _stop(self, app: web.Application) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.jobs.close)
        PACK_LOG.removeHandler(self.console)

    # The page and its socket

    async def index(self, request: web.Request) -> web.StreamResponse:
        """The editor. A browser that comes for the first time is sent to the demo workflow.

        Later the editor restores what was open from the browser's storage, unless its settings forbid that; a
        browser without anything to restore would show ComfyUI's own example, whose nodes are not here.
        """
        seen = f"{PACK_NAME}_{request.url.port}"  # cookies are shared by ports, storage is not
        restores = self.storage.settings().get("Comfy.Workflow.Persist", True)
        demo = self.pack / "workflows" / f"{DEMO}.json"
        if request.query_string or (restores and seen in request.cookies) or not demo.is_file():
            return web.FileResponse(self.frontend / "index.html")
        redirect = web.HTTPFound(f"/?template={DEMO}&source={PACK_NAME}")
        redirect.set_cookie(seen, "1", max_age=10 * 365 * 86400, httponly=True, samesite="Strict")
        raise redirect

    async def websocket(self, request: web.Request) -> web.StreamResponse:
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
        self.sockets.tell(self._status())

    def _on_event(self, job: Job, kind: str, data: dict[str, Any]) -> None:
        message = {"preview": preview_frame, "notice": notice_frame}.get(kind)
        self.sockets.tell(message(data) if message else {"type": kind, "data": data}, job.client_id)

    # Prompts, queue, history

    async def queue_length(self, request: web.Request) -> web.Response:
        return web.json_response({"exec_info": {"queue_remaining": self.jobs.remaining()}})

    async def submit(self, request: web.Request) -> web.Response:
        """Check a prompt and queue it. 400 with the errors by node when nothing of it can run."""
        body = await _table(request)
        try:
            checked = validate(body.get("prompt"), self.registry, body.get("partial_execution_targets"))
        except InvalidPrompt as error:
            for sentence in error.sentences():
                log.error("the workflow was refused: %s", sentence)
            return web.json_response({"error": error.error, "node_errors": error.node_errors}, status=400)
        extra, client_id = body.get("extra_data") or {}, body.get("client_id")
        if not isinstance(extra, dict):
            raise ValueError(f"extra_data must be a JSON object, got {type(extra).__name__}")
        front = bool(body.get("front")) or (body.get("number") or 0) < 0
        job = self.jobs.submit(checked, extra, client_id, _job_id(body.get("prompt_id")), front)
        told = {"prompt_id": job.id, "number": job.number, "node_errors": checked.node_errors}
        return web.json_response(told)

    async def queue(self, request: web.Request) -> web.Response:
        running, pending = (self.jobs.listed((status,)) for status in ACTIVE)
        told = {"queue_running": running, "queue_pending": pending}
        return web.json_response({name: [job.as_tuple() for job in jobs] for name, jobs in told.items()})

    async def change_queue(self, request: web.Request) -> web.Response:
        body = await _table(request)
        waiting = [job.id for job in self.jobs.listed(("pending",))]
        for job_id in waiting if body.get("clear") else body.get("delete", []):
            if job_id in waiting:
                self.jobs.cancel(job_id)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        jobs = self.jobs.listed(("completed", "failed", "cancelled"))
        if "id" in request.match_info:
            jobs = [job for job in jobs if job.id == request.match_info["id"]]
        if request.query.get("max_items"):
            jobs = jobs[: int(request.query["max_items"])]
        told = {
            job.id: {"prompt": job.as_tuple(), "outputs": job.outputs, "status": job.summary(), "meta": {}}
            for job in reversed(jobs)
        }
        return web.json_response(told)

    async def change_history(self, request: web.Request) -> web.Response:
        body = await _table(request)
        self.jobs.forget_history(None if body.get("clear") else list(body.get("delete", [])))
        return web.Response()

    async def list_jobs(self, request: web.Request) -> web.Response:
        wanted = request.query.get("status", "pending,in_progress,completed,failed,cancelled").split(",")
        offset, limit = (
            int(request.query.get(name, default)) for name, default in (("offset", 0), ("limit", 100))
        )
        jobs = self.jobs.listed(tuple(wanted))
        page = jobs[max(0, offset) :][: max(0, limit)]
        pages = {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": offset + len(page) < len(jobs),
        }
        return web.json_response({"jobs": [job.describe() for job in page], "pagination": pages})

    async def show_job(self, request: web.Request) -> web.Response:
        job = self.jobs.find(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound
        return web.json_response(job.describe(full=True))

    async def cancel_job(self, request: web.Request) -> web.Response:
        return web.json_response({"cancelled": self.jobs.cancel(request.match_info["id"])})

    async def cancel_jobs(self, request: web.Request) -> web.Response:
        cancelled = [self.jobs.cancel(str(job_id)) for job_id in (await _table(request)).get("job_ids", [])]
        return web.json_response({"cancelled": any(cancelled)})

    async def interrupt(self, request: web.Request) -> web.Response:
        self.jobs.interrupt((await _table(request)).get("prompt_id"))
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        self.jobs.free_memory()
        return web.Response()

    # What there is

    async def object_info(self, request: web.Request) -> web.Response:
        class_type = request.match_info.get("id")
        if class_type is None:
            return web.json_response(self.registry.object_info())
        known = class_type in self.registry
        return web.json_response({class_type: self.registry.describe(class_type)} if known else {})

    async def extensions(self, request: web.Request) -> web.Response:
        """Addresses of the pack's scripts; the frontend imports each."""
        web_folder = self.pack / "web"
        scripts = sorted(path.relative_to(web_folder).as_posix() for path in web_folder.rglob("*.js"))
        return web.json_response([f"/extensions/{PACK_NAME}/{script}" for script in scripts])

    async def templates(self, request: web.Request) -> web.Response:
        names = sorted(path.stem for path in (self.pack / "workflows").glob("*.json"))
        return web.json_response({PACK_NAME: names} if names else {})

    async def template(self, request: web.Request) -> web.StreamResponse:
        path = self.pack / "workflows" / Path(request.match_info["name"]).name
        if path.suffix not in (".json", ".jpg") or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    async def logs(self, request: web.Request) -> web.Response:
        size = {"cols": 80, "rows": 24}  # of a terminal that is none
        return web.json_response({"entries": list(self.console.entries), "size": size})

    async def system_stats(self, request: web.Request) -> web.Response:
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
        return web.json_response(
            {"system": system, "devices": devices or [_device("cpu", "cpu", 0, total, free)]}
        )


def _under_api(route: web.RouteDef) -> web.RouteDef:
    return web.RouteDef(route.method, f"/api{route.path}", route.handler, route.kwargs)


def answer(value: Any) -> Handler:
    """A handler that always answers the same JSON."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(value)

    return handler


async def _table(request: web.Request) -> dict[str, Any]:
    """A request's JSON object, empty without a body. Raises ValueError for other JSON."""
    try:
        body = json.loads(await request.text() or "{}")
    except ValueError as error:
        raise ValueError(f"the request is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("the request must be a JSON object")
    return body


def _job_id(wanted: Any) -> str | None:
    """The id that the editor chose for a job. Raises ValueError unless it is a UUID."""
    return None if wanted is None else str(uuid.UUID(str(wanted)))


def _memory() -> tuple[int, int]:
    """(total, free) bytes of memory, 0 where the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def _device(name: str, kind: str, index: int, total: int, free: int) -> dict[str, Any]:
    memory = {"vram_total": total, "vram_free": free, "torch_vram_total": 0, "torch_vram_free": 0}
    return {"name": name, "type": kind, "index": index, **memory}


# `python3 run.py`


def add_arguments(parser: Parser) -> None:
    """The options of `python3 run.py [serve]`."""
    parser.add_argument("--port", type=port_number, default=8188, help="port of the editor (8188)")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to answer on (127.0.0.1: this machine only)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_models()
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures are saved (data/output)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="pictures, uploads, workflows and settings (data)"
    )


def main(argv: list[str]) -> int:
    """Serve the editor until Ctrl-C; the exit code."""
    parser = Parser("run.py serve", description="The node editor in the browser.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        folders = Folders.under(args.data, args.output, tuple(args.models))
        asyncio.run(_serve(Server(Registry.of_pack(folders), find_frontend()), args))
    except SaveError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def find_frontend() -> Path:
    """The frontend's files in its installed wheel. Raises SaveError when it is not installed."""
    found = importlib.util.find_spec("comfyui_frontend_package")
    if found is None or found.origin is None:
        raise SaveError("the package comfyui-frontend-package is not installed; start with python3 run.py")
    return Path(found.origin).parent / "static"


async def _serve(server: Server, args: argparse.Namespace) -> None:
    """Answer until a signal comes. Raises SaveError when the address cannot be had."""
    runner = web.AppRunner(server.app(is_loopback(args.listen)), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, args.listen, args.port).start()
    except OSError as error:
        await runner.cleanup()
        reason = f"cannot answer on {args.listen}: {error.strerror or error}; choose another --listen"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = f"port {args.port} is taken; close what runs there, or choose another with --port"
        raise SaveError(reason) from error
    port = runner.addresses[0][1]
    for old in server.registry.folders.temp.glob("preview_*.png"):
        old.unlink(missing_ok=True)
    name = "127.0.0.1" if args.listen in ("0.0.0.0", "::") else args.listen
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    _say(f"Rectiflux is at {address}  (Ctrl-C ends it)")
    if not is_loopback(args.listen):
        _say(
            "WARNING: it answers to every machine that reaches this one. There is no password: whoever finds "
            "it can run workflows, see and overwrite pictures, and fill the disk."
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM"):
        try:
            loop.add_signal_handler(getattr(signal, name), stop.set)
        except NotImplementedError:  # Windows: Ctrl-C raises KeyboardInterrupt here
            break
    if not args.no_browser:
        loop.run_in_executor(None, webbrowser.open, address)
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
