"""Command-line parsing shared by `serve` and `render`: one-sentence errors, ports, model folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ..flux_core.weights.file_names import is_encodable
from ..flux_core.weights.messages import quoted
from .guard import HOST_NAME


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one sentence and exits with code 1."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[-1]
        self.exit(1, f"{command}: {message} (see {self.prog} --help)\n")

    def add_models(self) -> None:
        """Add the option --models, which may be given several times."""
        self.add_argument(
            "--models",
            type=_folder,
            action="append",
            default=[],
            metavar="DIR",
            help="a folder with diffusion_models/, vae/, checkpoints/, ... inside; may be repeated",
        )


def port_number(text: str) -> int:
    """The port from the command line, for argparse's `type`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, got {text!r}")
    return int(text)


def host_name(text: str) -> str:
    """A host name from the command line, without port or scheme, for argparse's `type`."""
    if not HOST_NAME.fullmatch(text.lower()):
        raise argparse.ArgumentTypeError(f"must be a name such as x.example, got {text!r}")
    return text.lower()


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"the folder {text} does not exist")
    if not is_encodable(str(Path(text).absolute())):
        raise argparse.ArgumentTypeError(f"the name {quoted(text)} is not valid Unicode (UTF-8); rename it")
    return Path(text).absolute()
