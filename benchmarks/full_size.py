"""A full-size FLUX.1 on this machine: seconds and memory to load it and to take a step.

    python3 run.py bench full-size [--formats bf16 fp8 Q4_K] [--sides 256 512] [--limit auto] [--json FILE]

A file of 11.9 billion random weights with FLUX.1 [dev]'s names and shapes is written in each format, up to
24 GB, measured in its own process, and deleted. With --file FILE your own file is measured instead. A quarter
of an hour on two cores. The columns:

  load      seconds until the model can be used; a random file is not in the page cache when it is loaded
  prepare   seconds for what is computed once a run: text projection, modulations of two sigmas (27 % of the
            weights)
  step      seconds of the second step at a size, with those of the first in brackets
  own       peak of the process's own (anonymous) memory, GB of 10^9 bytes
  mapped    peak of the file's resident pages
  swapped   peak of swapped memory

The last line has the highest own and swapped memory of all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..flux_core.memory import LIMITS
from ..flux_core.model.spec import FluxSpec
from ..flux_core.train.progress import ProgressLine
from .footprint import measure
from .random_file import ENDINGS, FORMATS, SPEC, OnProgress, estimated_bytes
from .report import add_json, parser_of, positive, write_report

ROOT = Path(__file__).resolve().parent.parent
SMALL = FluxSpec(256, 2, 2, 2, context_in=256, vec_in=256, guidance_embed=True)
"""The model of --quick."""


def main(argv: list[str]) -> int:
    """Write, measure and delete a file in each format; the exit code, 1 where the disk is too small."""
    parser = parser_of("full-size", __doc__)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--sides", nargs="+", type=positive, default=[256, 512], help="sides of the images, multiples of 16"
    )
    parser.add_argument("--limit", choices=LIMITS, default="auto", help="memory for the weights")
    parser.add_argument(
        "--dir", type=Path, help="where the files are written (default: the temporary folder)"
    )
    parser.add_argument("--file", type=Path, help="measure this file or folder, in this process")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where available")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if any(side % 16 for side in arguments.sides):
        parser.error("--sides must be multiples of 16")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    print(head(arguments.sides))
    try:
        rows = [measure_file(arguments)] if arguments.file else measure_random(arguments)
    except (OSError, ValueError) as error:
        print(f"full-size could not be measured: {error}", file=sys.stderr)
        return 1
    headline = {
        "most_own_gb": max(row["anonymous"] for row in rows) / 1e9,
        "most_swapped_gb": max(row["swapped"] for row in rows) / 1e9,
    }
    write_report(arguments, "full-size", {"rows": rows, "headline": headline})
    print("most_own_gb {most_own_gb:.2f} most_swapped_gb {most_swapped_gb:.2f}".format(**headline))
    return 0


def measure_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the file that --file names."""
    figures = measure(arguments.file, arguments.sides, arguments.limit, torch.device(arguments.device))
    row = {"format": arguments.file.name[:16], "limit": arguments.limit, **figures}
    print(line(row, arguments.sides), flush=True)
    return row


def measure_random(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of random files, each written, measured by a child process, and deleted.

    Raises OSError where the disk is too small, and where a child process was killed.
    """
    spec, rows = SMALL if arguments.quick else SPEC, []
    with tempfile.TemporaryDirectory(dir=arguments.dir, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for name in arguments.formats:
            need, free = estimated_bytes(name, spec), shutil.disk_usage(folder).free
            if need > free:
                raise OSError(
                    f"{name} needs {need / 1e9:.0f} GB of disk, {folder.parent} has {free / 1e9:.0f} GB; "
                    "choose another --dir or fewer --formats"
                )
            path = folder / f"random{ENDINGS[name]}"
            FORMATS[name](path, spec, percent_written(name))
            rows.append({**in_own_process(path, folder / "figures.json", arguments), "format": name})
            path.unlink()
            print(line(rows[-1], arguments.sides), flush=True)
    return rows


def percent_written(name: str) -> OnProgress:
    """Show how much of a file is written."""
    progress = ProgressLine(100)
    return lambda done, total: progress.update(100 * done // total, f"% of the {name} file written")


def in_own_process(path: Path, report: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a file by a child process, which contains nothing else."""
    command = [sys.executable, str(ROOT / "run.py"), "bench", "full-size", "--file", str(path)]
    command += ["--sides", *map(str, arguments.sides), "--limit", arguments.limit]
    command += ["--device", arguments.device, "--threads", str(arguments.threads), "--json", str(report)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        outcome = "was killed" if ended.returncode < 0 else "failed"
        raise OSError(f"the process that measured {path.name} {outcome} (exit code {ended.returncode})")
    return json.loads(report.read_text(encoding="utf-8"))["figures"]["rows"][0]


def head(sides: list[int]) -> str:
    """The titles of the columns."""
    steps = "".join(f"{f'step {side}':>16}" for side in sides)
    memory = f"{'own':>7}{'mapped':>8}{'swapped':>9}"
    return f"{'format':16}{'limit':>7}{'file':>7}{'load':>7}{'prepare':>9}{steps}{memory}"


def line(row: dict[str, Any], sides: list[int]) -> str:
    """A row of the table: sizes in GB, times in seconds."""
    steps = ""
    for side in sides:
        seconds = f"{row[f'second_{side}']:.1f} ({row[f'first_{side}']:.1f})"
        steps += f"{seconds:>16}"
    sizes = [row[name] / 1e9 for name in ("file", "anonymous", "mapped", "swapped")]
    return (
        f"{row['format']:16}{row['limit']:>7}{sizes[0]:7.1f}{row['load']:7.1f}"
        f"{row[f'prepare_{sides[0]}']:9.1f}{steps}{sizes[1]:7.2f}{sizes[2]:8.1f}{sizes[3]:9.2f}"
    )
