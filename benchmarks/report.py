"""Shared by the benchmarks: help, checks of options, --json FILE and the file that it writes.

{"benchmark": its name, "options": as given, "machine": what it ran on, "figures": all measured values}
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a benchmark's docstring: first line, (usage,) and the rest."""
    about, _, more = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"run.py bench {name}",
        description=about,
        epilog=more.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json; a file that cannot be written is refused before anything is measured."""
    parser.add_argument(
        "--json", type=writable, metavar="FILE", help="write all measured values to this file, as JSON"
    )


def positive(text: str) -> int:
    """An integer above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer above 0")
    return int(text)


def writable(name: str) -> Path:
    """A path in an existing, writable folder, for argparse."""
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} must be a file in a folder that exists")
    if not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} is in a folder without write permission")
    return path


def write_report(arguments: argparse.Namespace, benchmark: str, figures: dict[str, Any]) -> None:
    """Write the file that --json names, if any, atomically; NaN and inf become null."""
    if arguments.json is None:
        return
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    report = {"benchmark": benchmark, "options": options, "machine": machine(), "figures": figures}
    part = arguments.json.with_name(arguments.json.name + ".part")
    part.write_text(json.dumps(_json_value(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, arguments.json)


def machine() -> dict[str, str | int]:
    """Processor, threads and versions, on which the values depend."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _processor() -> str:
    """The processor's model from /proc/cpuinfo, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _json_value(value: Any) -> Any:
    """The value as JSON types: paths become strings, NaN and inf None."""
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
