"""The server's routes for prompts, queue, history and jobs."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from .jobs import ACTIVE, ENDED, Job, Jobs, QueueFull
from .json_reader import quoted
from .json_writer import json_response, to_json
from .registry import Registry
from .request_reading import field, id_list, json_object, query_integer
from .validation import InvalidPrompt, validate

log = logging.getLogger(__name__)

ENDED_STATUSES = tuple(ENDED.values())
ALL_STATUSES = (*ACTIVE, *ENDED_STATUSES)
ACCOUNT_FIELDS = ("auth_token_comfy_org", "api_key_comfy_org")
"""Secrets in the extra data that the editor sends; nothing here uses them, and /history shows the rest."""


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
        return json_response({"exec_info": {"queue_remaining": self.jobs.remaining()}})

    async def submit(self, request: web.Request) -> web.Response:
        """Validate a prompt and queue it. 400 with the errors by node when no part of it can run."""
        body = await json_object(request)
        options = _job_options(body)
        targets = body.get("partial_execution_targets")
        if targets is not None:
            targets = id_list(body, "partial_execution_targets")
        try:
            checked = await asyncio.to_thread(validate, body.get("prompt"), self.registry, targets)
        except InvalidPrompt as error:
            for sentence in error.sentences():
                log.error("the workflow was refused: %s", sentence)
            return json_response({"error": error.error, "node_errors": error.node_errors}, status=400)
        try:
            job = self.jobs.submit(checked, _extra_data(body), **options)
        except QueueFull as error:
            raise web.HTTPTooManyRequests(text=str(error)) from error
        accepted = {"prompt_id": job.id, "number": job.priority, "node_errors": checked.node_errors}
        return json_response(accepted)

    async def queue(self, request: web.Request) -> web.Response:
        """The running and the pending prompts."""
        running, pending = (self.jobs.listed((status,)) for status in ACTIVE)
        lists = {"queue_running": running, "queue_pending": pending}
        return await _in_thread(
            lambda: {name: [job.as_tuple() for job in jobs] for name, jobs in lists.items()}
        )

    async def change_queue(self, request: web.Request) -> web.Response:
        """Remove pending jobs: `delete` (ids), or all with `clear`."""
        clear, ids = _removal(await json_object(request))
        pending = {job.id for job in self.jobs.listed(("pending",))}
        for job_id in pending if clear else pending.intersection(ids):
            self.jobs.cancel(job_id)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        """Ended jobs, oldest first, or the one of the path.

        As in ComfyUI: `max_items` alone gives the newest, with `offset` those after the first `offset`.
        """
        offset = query_integer(request, "offset", None)
        max_items = query_integer(request, "max_items", None)
        if "id" in request.match_info:
            found = self.jobs.find(request.match_info["id"])
            jobs = [found] if found is not None and found.status in ENDED_STATUSES else []
        else:
            jobs = _window(self.jobs.listed(ENDED_STATUSES)[::-1], offset, max_items)
        return await _in_thread(
            lambda: {
                job.id: {
                    "prompt": job.as_tuple(),
                    "outputs": job.outputs,
                    "status": job.summary(),
                    "meta": {},
                }
                for job in jobs
            }
        )

    async def change_history(self, request: web.Request) -> web.Response:
        """Remove ended jobs: `delete` (ids), or all with `clear`."""
        clear, ids = _removal(await json_object(request))
        self.jobs.clear_history(None if clear else ids)
        return web.Response()

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Jobs by `status` and `workflow_id`, from `offset` on, at most `limit`."""
        query = request.query
        statuses = tuple(filter(None, query.get("status", "").replace(" ", "").split(","))) or ALL_STATUSES
        for status in statuses:
            _check_choice("status", status, ALL_STATUSES)
        offset, limit = (
            max(0, query_integer(request, "offset", 0) or 0),
            query_integer(request, "limit", None),
        )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be a positive integer, got {limit}")
        jobs = self.jobs.listed(statuses)
        if "workflow_id" in query:
            jobs = [job for job in jobs if job.workflow_id == query["workflow_id"]]
        if "sort_by" in query or "sort_order" in query:
            jobs = _sorted(jobs, query.get("sort_by", "created_at"), query.get("sort_order", "desc"))
        page = jobs[offset:] if limit is None else jobs[offset : offset + limit]
        pagination = {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": offset + len(page) < len(jobs),
        }
        return await _in_thread(lambda: {"jobs": [job.describe() for job in page], "pagination": pagination})

    async def show_job(self, request: web.Request) -> web.Response:
        """One job with its outputs and its prompt."""
        job = self.jobs.find(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound(
                text=f"there is no job {quoted(request.match_info['id'])}; it may have been removed"
            )
        return await _in_thread(lambda: job.describe(full=True))

    async def cancel_job(self, request: web.Request) -> web.Response:
        """Cancel the job of the path."""
        return json_response({"cancelled": self.jobs.cancel(request.match_info["id"])})

    async def cancel_jobs(self, request: web.Request) -> web.Response:
        """Cancel the jobs in `job_ids`."""
        cancelled = [self.jobs.cancel(job_id) for job_id in id_list(await json_object(request), "job_ids")]
        return json_response({"cancelled": any(cancelled)})

    async def interrupt(self, request: web.Request) -> web.Response:
        """Stop the running job, or only if it is `prompt_id`."""
        self.jobs.interrupt(field(await json_object(request), "prompt_id", str))
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        """Drop cached results and models, unless both `unload_models` and `free_memory` are false."""
        body = await json_object(request)
        wanted = [field(body, name, bool) for name in ("unload_models", "free_memory") if name in body]
        if any(wanted) or not wanted:
            self.jobs.free_memory()
        return web.Response()


async def _in_thread(make: Callable[[], Any]) -> web.Response:
    """A response with the JSON of `make()`, which may take long for many jobs."""
    text = await asyncio.to_thread(lambda: to_json(make()))
    return web.Response(text=text, content_type="application/json")


def _window(jobs: list[Job], offset: int | None, max_items: int | None) -> list[Job]:
    """The jobs, oldest first, that ComfyUI's /history returns for these queries."""
    if offset is None or offset < 0:
        offset = 0 if max_items is None else len(jobs) - max_items
    jobs = jobs[max(0, offset) :]
    return jobs if max_items is None else jobs[: max(0, max_items)]


def _sorted(jobs: list[Job], sort_by: str, order: str) -> list[Job]:
    """The jobs by their time of creation, or by how long they took."""
    _check_choice("sort_by", sort_by, ("created_at", "execution_duration"))
    _check_choice("sort_order", order, ("asc", "desc"))

    def key(job: Job) -> int:
        return job.created if sort_by == "created_at" else (job.ended or 0) - (job.started or 0)

    return sorted(jobs, key=key, reverse=order == "desc")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {quoted(value)}")


def _removal(body: dict[str, Any]) -> tuple[bool, list[str]]:
    """(clear, delete) of a request that removes jobs. Raises ValueError for other types."""
    return field(body, "clear", bool, False), id_list(body, "delete")


def _job_options(body: dict[str, Any]) -> dict[str, Any]:
    """The id, owner and place in the queue that a prompt asks for. Raises ValueError for other types."""
    return {
        "client_id": field(body, "client_id", str),
        "job_id": _job_id(body),
        "priority": field(body, "number", int),
        "front": field(body, "front", bool, False),
    }


def _job_id(body: dict[str, Any]) -> str | None:
    """The job id that the editor chose. Raises ValueError unless it is a UUID as ComfyUI wants it."""
    wanted = field(body, "prompt_id", str)
    if wanted is None:
        return None
    try:
        is_canonical = str(uuid.UUID(wanted)) == wanted
    except ValueError:
        is_canonical = False
    if not is_canonical:
        raise ValueError(
            f"prompt_id must be a UUID in lower case with hyphens, got {quoted(wanted)}; omit it"
        )
    return wanted


def _extra_data(body: dict[str, Any]) -> dict[str, Any]:
    """A prompt's extra data without accounts. Raises ValueError for other types."""
    extra_data = field(body, "extra_data", dict, {})
    field(field(extra_data, "extra_pnginfo", dict, {}), "workflow", dict)
    field(extra_data, "preview_method", str)
    return {name: value for name, value in extra_data.items() if name not in ACCOUNT_FIELDS}
