"""Reads request bodies within limits of size and time, checks fields, answers errors in one sentence."""

from __future__ import annotations

import asyncio
import codecs
import errno
import logging
import tempfile
import traceback
from typing import Any

from aiohttp import web

from .files import NO_SPACE, SaveError
from .guard import Handler
from .json_reader import quoted, read_json
from .json_writer import json_response

log = logging.getLogger(__name__)

BODY_PATIENCE = 30.0
"""Seconds for a small body."""
SLOWEST_BODY = 2**17
"""Bytes per second that a large body must have beyond that."""
ENCODINGS = ("identity", "gzip", "deflate")
JSON_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
NAME_ERRORS = {
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EISDIR: "a folder has this name; choose another name",
    errno.ENOTDIR: "a part of the path is a file; choose another name",
    errno.ENOTEMPTY: "a folder has this name; choose another name",
    errno.EEXIST: "the name is in use; choose another name",
    errno.EINVAL: "the name cannot be used on this system; choose another name",
    errno.EILSEQ: "the name cannot be used on this system; choose another name",
    errno.ELOOP: "the path leads through too many links; choose another name",
}
"""What the user can do about errors that the requested name causes."""
FILE_ERRORS = {**NAME_ERRORS, **dict.fromkeys(NO_SPACE, "the disk is full; free some space and try again")}
"""Those and a full disk's, whose file need not be one that the user named."""


@web.middleware
async def read_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Read the body before the handler, so that a slow or malformed one costs nothing but its connection."""
    _check_dates(request)
    is_form = False
    if request.body_exists and request.method != "GET" and request.match_info.http_exception is None:
        _check_encoding(request)
        length = request.content_length
        limit = BODY_PATIENCE + (request.client_max_size if length is None else length) / SLOWEST_BODY
        if length is not None and length > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, length)
        try:
            is_form = request.content_type == "multipart/form-data"
            await asyncio.wait_for(_read_form(request) if is_form else request.read(), limit)
        except asyncio.TimeoutError as error:
            failed = web.HTTPRequestTimeout(
                text=f"the request's body did not arrive within {limit:.0f} s; retry"
            )
            failed.force_close()
            raise failed from error
        except (web.HTTPException, OSError):  # OSError: closed, or the disk for uploads is full
            raise
        except Exception as error:  # aiohttp's parsers raise many classes, some of them private
            log.debug("a request's body cannot be read", exc_info=error)
            raise ValueError(f"the request's body cannot be read: {_one_line(str(error))}") from error
    try:
        return await handler(request)
    finally:
        for value in (await request.post()).values() if is_form else ():
            if isinstance(value, web.FileField):
                value.file.close()


async def _read_form(request: web.Request) -> None:
    """`request.post()`, which leaves a form's temporary file open where reading ends early; closed here."""
    try:
        await request.post()
    except BaseException as error:  # a cancelled task too: the connection was lost
        for frame, _ in traceback.walk_tb(error.__traceback__):
            file = frame.f_locals.get("tmp")  # aiohttp/web_request.py, BaseRequest.post
            if isinstance(file, tempfile.SpooledTemporaryFile):
                file.close()
        raise


def _check_dates(request: web.Request) -> None:
    """Refuse dates that aiohttp cannot convert; it would only notice while it sends a file."""
    try:
        _ = request.if_modified_since, request.if_unmodified_since, request.if_range
    except (ValueError, OverflowError) as error:
        raise ValueError(
            "a date in the request's headers is out of range; send it as HTTP wants it"
        ) from error


def _check_encoding(request: web.Request) -> None:
    for encoding in request.headers.get("Content-Encoding", "identity").split(","):
        if encoding.strip().lower() not in ENCODINGS:
            allowed = ", ".join(ENCODINGS)
            sentence = f"the Content-Encoding must be one of {allowed}, got {quoted(encoding.strip())}"
            raise web.HTTPUnsupportedMediaType(text=sentence)


async def json_body(request: web.Request) -> Any:
    """The request's JSON value, parsed in a thread. Raises ValueError."""
    charset = request.charset or "utf-8"
    try:
        is_utf8 = codecs.lookup(charset).name in ("utf-8", "utf-8-sig", "ascii")
    except (LookupError, ValueError):
        is_utf8 = False
    if not is_utf8:
        raise web.HTTPUnsupportedMediaType(text=f"JSON must be in UTF-8, got charset {quoted(charset)}")
    return await asyncio.to_thread(read_json, await request.read(), "the request")


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's JSON object, empty without a body. Raises ValueError."""
    body = await json_body(request) if await request.read() else {}
    if not isinstance(body, dict):
        raise ValueError(f"the request must be a JSON object, got {quoted(body)}")
    return body


def field(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of a request; `default` when it is missing or null. Raises ValueError for another type."""
    value = body.get(name)
    if value is None:
        return default
    if kind is int:
        is_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        is_kind = isinstance(value, kind)
    if not is_kind:
        raise ValueError(f"{name} must be {JSON_KINDS[kind]}, got {quoted(value)}")
    return value


def id_list(body: dict[str, Any], name: str) -> list[str]:
    """A field that lists ids; empty when it is missing. Raises ValueError for another type."""
    ids = field(body, name, list, [])
    for value in ids:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a list of ids as text, got the element {quoted(value)}")
    return ids


def query_integer(request: web.Request, name: str, default: int | None) -> int | None:
    """An integer of the query; `default` when it is missing or empty. Raises ValueError."""
    text = request.query.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise ValueError(f"{name} must be an integer, got {quoted(text)}")
    return int(text)


@web.middleware
async def explain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request that fails with one sentence, as JSON {"error": sentence} or, by aiohttp, as text."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status >= 400:
            is_generic = error.text == f"{error.status}: {error.reason}"
            error.text = (
                _http_sentence(request, error) if is_generic else _one_line(error.text or error.reason)
            )
        raise
    except SaveError as error:
        reason = NAME_ERRORS.get(getattr(error.__cause__, "errno", 0))
        sentence = f"the file cannot be saved: {reason}" if reason else str(error)
        return _error_response(_file_status(error.__cause__), sentence)
    except (ConnectionError, asyncio.TimeoutError):
        raise
    except OSError as error:
        log.debug("a request was refused", exc_info=error)
        reason = FILE_ERRORS.get(
            error.errno or 0, f"{error.strerror or error}; check the folder and its permissions"
        )
        return _error_response(_file_status(error), f"the file cannot be used: {reason}")
    except ValueError as error:
        log.debug("a request was refused", exc_info=error)
        return _error_response(400, str(error))
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        log.debug("a request was refused", exc_info=error)
        return _error_response(400, f"a value in the request is missing or has the wrong type: {error}")


def _file_status(error: BaseException | None) -> int:
    """The HTTP status for a file that cannot be read or written."""
    number = error.errno if isinstance(error, OSError) else None
    if number in NO_SPACE:
        return 507
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 403
    return 404 if number == errno.ENOENT else 400


def _http_sentence(request: web.Request, error: web.HTTPException) -> str:
    path = quoted(request.path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return f"{quoted(request.method)} is not possible for {path}; use one of {allowed}"
    if error.status == 404:
        return f"{path} does not exist; check its spelling"
    return f"the request for {path} was refused: {error.reason}"


def _one_line(text: str, limit: int = 800) -> str:
    """Text for an error message: on one line, at most `limit` characters, without lone surrogates."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _error_response(status: int, sentence: str) -> web.Response:
    sentence = _one_line(sentence) or "the request is not valid"
    reason = "".join(letter if " " <= letter <= "~" else "?" for letter in sentence[:200])
    return json_response({"error": sentence}, status=status, reason=reason)
