"""The files that a module's weights are mapped from, and whether they are still the same.

Reading mapped weights of a file that was cut short ends the process (SIGBUS), and those of one that was
written over are another model's. A module remembers its files; whoever runs it asks first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

ATTRIBUTE = "weight_files"
"""The attribute of a module that holds its files' states; copies of the module have it too."""


@dataclass(frozen=True)
class FileState:
    """Size in bytes and time of the last change, in ns, of a file when it was opened."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def is_current(self) -> bool:
        """Whether the file is as it was; one that was deleted stays mapped as it was."""
        try:
            return FileState.of(self.path) == self
        except OSError:
            return True


def remember_files(module: nn.Module, files: tuple[FileState, ...]) -> None:
    """Have the module know which files its weights come from."""
    setattr(module, ATTRIBUTE, files)


def files_of(*modules: nn.Module) -> tuple[FileState, ...]:
    """The files that the modules or parts of them come from."""
    parts = (part for module in modules for part in module.modules())
    return tuple(dict.fromkeys(file for part in parts for file in getattr(part, ATTRIBUTE, ())))


def check_unchanged(*modules: nn.Module) -> None:
    """Raise ValueError when a file that the modules come from was changed after it was loaded."""
    for file in files_of(*modules):
        if not file.is_current():
            raise ValueError(
                f"{file.path.name} was changed on disk after it was loaded; "
                "check that the file is whole, and run the workflow again to load it anew"
            )
