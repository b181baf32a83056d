"""What the commands' options share: one sentence for a wrong one, ports, folders of models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in one sentence, with exit code 1, as for everything else."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[-1]
        self.exit(1, f"{command}: {message} (see {self.prog} --help)\n")

    def add_models(self) -> None:
        """The option --models, a list of folders."""
        self.add_argument(
            "--models",
            type=_folder,
            action="append",
            default=[],
            metavar="DIR",
            help="a folder with diffusion_models/, vae/, checkpoints/, ... in it; may be given again",
        )


def port_number(text: str) -> int:
    """A port's number, for argparse's `type`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 65535, got {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text).absolute()
