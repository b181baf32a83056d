"""Errors of loading a file: one sentence that names the file, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ADVICE = re.compile("[;,] (download|choose|convert|fetch|put|remove|load|check|correct|install) ")


def refusal(load: Callable, *paths: Path, error: type[Exception] = ValueError) -> str:
    """The message with which `load(*paths)` refuses the files; `load` must fail with that error."""
    with pytest.raises(error) as refused:
        load(*paths)
    message = str(refused.value)
    assert "\n" not in message and not message.endswith("."), message
    assert any(path.name in message for path in paths), message
    assert ADVICE.search(message), message
    return message
