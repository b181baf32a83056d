"""The server's routes for prompts, queue, history and jobs."""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from aiohttp import web

from .jobs import ACTIVE, ENDED, Jobs
from .registry import Registry
from .validation import InvalidPrompt, validate

log = logging.getLogger(__name__)

ENDED_STATUSES = tuple(ENDED.values())


class QueueRoutes:
    """Handlers over the queue; prompts are validated against the registry."""

    def __init__(self, registry: Registry, jobs: Jobs) -> None:
        self.registry = registry
        self.jobs = jobs

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
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
        ]

    async def queue_length(self, request: web.Request) -> web.Response:
        """How many jobs are running or pending."""
        return web.json_response({"exec_info": {"queue_remaining": self.jobs.remaining()}})

    async def submit(self, request: web.Request) -> web.Response:
        """Validate a prompt and queue it. 400 with the errors by node when no part of it can run."""
        body = await _json_object(request)
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
        accepted = {"prompt_id": job.id, "number": job.priority, "node_errors": checked.node_errors}
        return web.json_response(accepted)

    async def queue(self, request: web.Request) -> web.Response:
        """The running and the pending prompts."""
        running, pending = (self.jobs.listed((status,)) for status in ACTIVE)
        lists = {"queue_running": running, "queue_pending": pending}
        return web.json_response({name: [job.as_tuple() for job in jobs] for name, jobs in lists.items()})

    async def change_queue(self, request: web.Request) -> web.Response:
        """Remove pending jobs: `delete` (ids), or all with `clear`."""
        body = await _json_object(request)
        pending = [job.id for job in self.jobs.listed(("pending",))]
        for job_id in pending if body.get("clear") else body.get("delete", []):
            if job_id in pending:
                self.jobs.cancel(job_id)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        """Ended jobs, at most `max_items`, or the one of the path."""
        jobs = self.jobs.listed(ENDED_STATUSES)
        if "id" in request.match_info:
            jobs = [job for job in jobs if job.id == request.match_info["id"]]
        if request.query.get("max_items"):
            jobs = jobs[: int(request.query["max_items"])]
        entries = {
            job.id: {"prompt": job.as_tuple(), "outputs": job.outputs, "status": job.summary(), "meta": {}}
            for job in reversed(jobs)
        }
        return web.json_response(entries)

    async def change_history(self, request: web.Request) -> web.Response:
        """Remove ended jobs: `delete` (ids), or all with `clear`."""
        body = await _json_object(request)
        self.jobs.clear_history(None if body.get("clear") else list(body.get("delete", [])))
        return web.Response()

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Jobs by `status`, from `offset` on, at most `limit`."""
        query = request.query
        statuses = tuple(query["status"].split(",")) if "status" in query else (*ACTIVE, *ENDED_STATUSES)
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", 100))
        jobs = self.jobs.listed(statuses)
        page = jobs[max(0, offset) :][: max(0, limit)]
        pagination = {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": offset + len(page) < len(jobs),
        }
        return web.json_response({"jobs": [job.describe() for job in page], "pagination": pagination})

    async def show_job(self, request: web.Request) -> web.Response:
        """One job with its outputs and its prompt."""
        job = self.jobs.find(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound
        return web.json_response(job.describe(full=True))

    async def cancel_job(self, request: web.Request) -> web.Response:
        """Cancel the job of the path."""
        return web.json_response({"cancelled": self.jobs.cancel(request.match_info["id"])})

    async def cancel_jobs(self, request: web.Request) -> web.Response:
        """Cancel the jobs in `job_ids`."""
        job_ids = (await _json_object(request)).get("job_ids", [])
        cancelled = [self.jobs.cancel(str(job_id)) for job_id in job_ids]
        return web.json_response({"cancelled": any(cancelled)})

    async def interrupt(self, request: web.Request) -> web.Response:
        """Stop the running job, or only if it is `prompt_id`."""
        self.jobs.interrupt((await _json_object(request)).get("prompt_id"))
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        """Drop cached results and models."""
        self.jobs.free_memory()
        return web.Response()


async def _json_object(request: web.Request) -> dict[str, Any]:
    """A request's JSON object, empty without a body. Raises ValueError for other JSON."""
    try:
        body = json.loads(await request.text() or "{}")
    except ValueError as error:
        raise ValueError(f"the request is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"the request must be a JSON object, got {type(body).__name__}")
    return body


def _job_id(requested: Any) -> str | None:
    """The job id that the editor chose. Raises ValueError unless it is a UUID."""
    return None if requested is None else str(uuid.UUID(str(requested)))
