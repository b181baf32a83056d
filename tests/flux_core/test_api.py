"""The public interface is what it says, and the library's layers are where they should be."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rectiflux import flux_core
from rectiflux.flux_core import flow, lora, weights
from rectiflux.flux_core.sampling import solver

ROOT = Path(flux_core.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
STAGES = ("text_encoders", "transformer", "autoencoder")
MAY_IMPORT = {
    "model": {"quant", "backends"},
    "sampling": {"model"},
    "tools": {"model"},
    "quant": set(),
    "backends": {"model", "quant", "lora", "memory"},
    "memory": {"model", "quant"},
    "weights": {"model", "quant", "memory"},
    "lora": {"model", "quant", "weights"},
    "flow": {"model", "sampling"},
    "train": {"", "model", "sampling", "tools", "weights"},
}
"""What the files of a folder may import besides their own folder: "" is pipeline.py and its like."""
OUTSIDE = {"torch", "einops", "safetensors", "tokenizers", "transformers", "numpy", "PIL"}
ONLY_IN = {
    "scipy": ("flow", "train", "tools"),  # assignment in couplings; connected components of edges
    "kornia": ("tools",),  # image filters
    "gguf": ("weights",),
    "regex": ("lora",),  # patterns of PEFT's alpha_pattern, with a limit on time
}
PACKAGES = (flux_core, flow, lora, solver, weights)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_the_public_interface(package: ModuleType) -> None:
    """Every public name that the package defines is in __all__, and the other way round."""
    values = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    public = {name for name, value in values.items() if not inspect.ismodule(value)}
    assert public == set(package.__all__)
    assert len(package.__all__) == len(public)


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in PACKAGES for name in package.__all__]
)
def test_what_is_public_says_what_it_is(package: ModuleType, name: str) -> None:
    """Functions and classes by a docstring; constants and aliases have one below them in the file."""
    value = getattr(package, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"


def imports(file: Path) -> set[str]:
    """Dotted names of all that a file imports, with the dots of relative imports; inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_library_knows_no_host(file: Path) -> None:
    """Only torch and its friends from outside, and no relative import that leaves the package."""
    outside = OUTSIDE | {
        name for name, parts in ONLY_IN.items() if set(parts) & set(file.relative_to(ROOT).parts)
    }
    for name in imports(file):
        depth = len(name) - len(name.lstrip("."))
        assert depth <= len(file.relative_to(ROOT).parts), f"{file.name} imports {name}"
        if depth == 0:
            top = name.split(".")[0]
            assert top in outside or top in sys.stdlib_module_names, f"{file.name} imports {name}"


def imported_folders(file: Path) -> set[str]:
    """Folders of flux_core that a file imports from, its own left out; "" for a file beside the folders."""
    depth = len(file.relative_to(ROOT).parts)
    found = {name[depth:] for name in imports(file) if name.startswith("." * depth)}
    folders = {name.split(".")[0] for name in found}
    return {name if (ROOT / name).is_dir() else "" for name in folders}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_those_below_them(folder: str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        below = imported_folders(file) if file.relative_to(ROOT).parts[0] == folder else set()
        assert below <= MAY_IMPORT[folder] | {folder}, f"{file.relative_to(ROOT)} imports {below}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage: str) -> None:
    """Text encoders, transformer and autoencoder meet in pipeline.py; each stands on spec and layers."""
    others = {f".{name}" for name in STAGES if name != stage}
    assert not imports(ROOT / "model" / f"{stage}.py") & others


def test_importing_the_library_leaves_slow_packages_for_later() -> None:
    """transformers' models, scipy and gguf take long to import, which a host would pay at its start."""
    slow = ("transformers.modeling_utils", "scipy", "gguf")
    code = f"import sys, flux_core, flux_core.flow; print(any(name in sys.modules for name in {slow}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
