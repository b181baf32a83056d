"""JSON from outside: its values, its limits, and one sentence for each refusal."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from rectiflux.host.json_reader import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    JsonError,
    quoted,
    read_json,
    read_json_object,
)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, True, None, "x"], "红 ü 🦊": {}},
        '"quoted" \\ [{,',
        ["\\", '\\"', "[" * 1000, "{,}" * 1000],
        [[]] * 1000,
    ],
)
def test_reads_what_json_writes(value: Any) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert read_json(text) == read_json(b"\xef\xbb\xbf" + text.encode()) == value


def test_values_that_cannot_be_stored_or_sent_are_replaced() -> None:
    """JSON.parse of the editor, except that it refuses NaN (its reader of images makes null of it)."""
    assert read_json('[NaN, -Infinity, 1e999, {"a": Infinity}]') == [None, None, None, {"a": None}]
    assert read_json('{"a": 1, "a": 2}') == {"a": 2}
    assert read_json('{"\\ud83d": ["\\udc00 x", "\\ud83e\\udd8a"]}') == {"\ufffd": ["\ufffd x", "🦊"]}


def nested(levels: int) -> bytes:
    return b'{"a":' * (levels // 2) + b"[" * (levels - levels // 2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{'a': 1}", "is not valid JSON (line 1, column 2"),
        (b'{"a": "', "is not valid JSON (line 1, column 7"),
        (b'"\\', "is not valid JSON"),
        (b"\xff\xfe[\0", "is not JSON: it must be text in UTF-8"),
        ("\ud83d", "is not JSON: it must be text in UTF-8"),
        (b"1" * 5000, "has an integer of more than 4300 digits"),
        (nested(MAX_DEPTH + 1), f"the limit is {MAX_DEPTH} levels, got {MAX_DEPTH + 1}"),
        (nested(1_000_000), "has too many values"),
        (b"[" + b"[]," * MAX_VALUES + b"[]]", "has too many values"),
        (b'"' * 4 * MAX_VALUES + b"  ", "is not valid JSON"),
        (b'"' * MAX_BYTES, "has too many values"),
        (b" " * (MAX_BYTES + 1), "is too large: the limit is 16 MB, got 16 MB"),
        ("ü".encode() * (MAX_BYTES // 4 + 1), "is too large: the limit is 8 MB"),
    ],
)
def test_refuses_the_rest_in_one_sentence(data: bytes | str, says: str) -> None:
    with pytest.raises(JsonError) as caught:
        read_json(data, "the body")
    assert str(caught.value).startswith("the body ") and says in str(caught.value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_the_deepest_and_the_longest_document_are_read() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(read_json(deepest)) == deepest
    assert read_json(json.dumps(["[]"] * (MAX_VALUES - 1))) == ["[]"] * (MAX_VALUES - 1)


@pytest.mark.parametrize(
    "unit", [b"[],", b'{"a":{}},', b'{"ab":1.5},', b'"",', b'\\"', b'"', b"[1.5],", b'"\xf0\x9f\xa6\x8a",']
)
def test_memory_is_bounded_by_the_documents_size(unit: bytes) -> None:
    for count in (2**20 // len(unit), MAX_VALUES // 2, 15 * 2**20 // len(unit)):
        data = b"[" + unit * count + b"0]"
        tracemalloc.start()
        try:
            read_json(data)
        except JsonError:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) + 64 * 2**20


def test_an_object_is_asked_for() -> None:
    assert read_json_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(JsonError, match=r"^the settings must be a JSON object .* got \['a'\]$"):
        read_json_object(b'["a"]', "the settings")


@pytest.mark.parametrize(
    "value", ["a\nb" * 10_000, b"\n" * 10_000, ["x" * 500] * 10_000, "\ud83d", {"a" * 300: 1}]
)
def test_a_quoted_value_is_one_short_line(value: Any) -> None:
    text = quoted(value)
    assert len(text) <= 200 and text.isprintable() and text.encode()
