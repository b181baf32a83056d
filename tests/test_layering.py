"""The layers keep apart, and nothing in the pack does what a pack must not: read off the syntax trees.

That flux_core knows no host and its stages do not know each other is in flux_core/test_api.py.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACK = sorted(path for part in ("flux_core", "nodes", "host") for path in (ROOT / part).rglob("*.py"))
NODES = [path for path in PACK if path.is_relative_to(ROOT / "nodes")]
HOST = [path for path in PACK if path.is_relative_to(ROOT / "host")]
COMFY = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST, at_import: bool = False) -> Iterator[str]:
    """Dotted names that are imported, relative ones with their dots; `at_import`: not those in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (base if node.module else base + alias.name for alias in node.names)
        elif not (at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from imports(node, at_import)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_file = pytest.mark.parametrize("path", PACK, ids=short)


@each_file
def test_the_pack_never_imports_itself_by_an_absolute_name(path: Path) -> None:
    """`nodes` is ComfyUI's own module, and the folder may have any name."""
    tops = {name.split(".")[0] for name in imports(parsed(path))}
    assert not tops & {"nodes", "flux_core", "host", "rectiflux"}


@pytest.mark.parametrize("path", NODES, ids=short)
def test_only_the_host_files_of_nodes_import_a_host(path: Path) -> None:
    """ComfyUI inside functions, at the time of a call: it replaces some of its classes while it starts."""
    names, at_import = (set(imports(parsed(path), only)) for only in (False, True))
    comfy = {name for name in names if name.split(".")[0] in COMFY}
    embedded = {name for name in names if name.startswith("..host")}
    sides = {name for name in names if name.startswith((".host_embedded", ".host_comfy"))}
    assert not comfy or (path.name.startswith("host_comfy") and not comfy & at_import)
    assert not embedded or path.name.startswith("host_embedded")
    assert not sides or (path.name == "host.py" and not sides & at_import) or path.name.startswith("host_")
    assert all(name.startswith("..flux_core") for name in names - embedded if name.startswith(".."))


@pytest.mark.parametrize("path", NODES, ids=short)
def test_no_node_tests_for_its_host(path: Path) -> None:
    """host.py chooses once; behind it each host has its own class."""
    if path.name != "host.py":
        conditions = [
            ast.unparse(node.test) for node in ast.walk(parsed(path)) if isinstance(node, (ast.If, ast.IfExp))
        ]
        assert not [test for test in conditions if re.search(r"\bhost\b|sys\.modules", test)]


@pytest.mark.parametrize("path", NODES, ids=short)
def test_nothing_of_comfyui_is_patched(path: Path) -> None:
    tree = parsed(path)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        assert not any(isinstance(t, ast.Attribute) and t.attr == "__class__" for t in targets)
    assert not any(name.endswith(".addFilter") for name, _ in calls(tree))


@pytest.mark.parametrize("path", HOST, ids=short)
def test_the_embedded_host_knows_no_comfyui_and_no_single_node(path: Path) -> None:
    names = set(imports(parsed(path)))
    assert not {name.split(".")[0] for name in names} & (COMFY - {"execution", "server"})
    assert not any(name.startswith("..nodes") for name in names)


def test_importing_the_pack_brings_no_host_along() -> None:
    """ComfyUI imports every pack at its start: no web server, no host, neither of the two slow packages.

    Nor do the menus of the nodes need them, which ComfyUI lists before a model runs.
    """
    code = f"""
import importlib.util, sys
place = {{"submodule_search_locations": [{str(ROOT)!r}]}}
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r}, **place)
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
hosts = [name for name in sys.modules if name.startswith(("pack.host", "pack.nodes.host_", "comfy"))]
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
slow = [name for name in ("aiohttp", "torch._dynamo", "transformers") if name in sys.modules]
print(*hosts, *slow)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@each_file
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    """A model file or workflow from anywhere must not become code."""
    tree = parsed(path)
    tops = {name.split(".")[0] for name in imports(tree)}
    assert not tops & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for name, call in calls(tree):
        assert name not in {"eval", "exec", "compile", "torch.load", "os.system", "__import__"}, (
            f"line {call.lineno}"
        )
        for keyword in call.keywords:
            assert keyword.arg not in {"allow_pickle", "weights_only", "trust_remote_code"}, (
                f"line {call.lineno}"
            )


@each_file
def test_no_subprocesses_where_an_artist_runs_it(path: Path) -> None:
    """run.py alone starts processes."""
    assert "subprocess" not in set(imports(parsed(path)))


@each_file
def test_libraries_log_and_catch_by_name(path: Path) -> None:
    tree = parsed(path)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"bare except, line {node.lineno}"
        )
    for name, call in calls(tree):
        assert name not in {"print", "logging.basicConfig"}, f"{name} in line {call.lineno}"


def test_the_requirements_never_touch_torch_or_a_version() -> None:
    """They are installed into an artist's ComfyUI: what is there has to stay as it is."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert names == sorted(names)
    for name in names:
        assert re.fullmatch(r"[a-z0-9-]+", name), f"{name!r} is more than a name"
        assert not name.startswith(("torch", "nvidia", "triton", "xformers"))


def test_every_requirement_has_its_tested_version() -> None:
    def listed(name: str) -> list[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    pins = dict(line.split("==") for line in listed("constraints.txt"))
    assert pins["torch"] == "2.13.0"
    wanted = [*listed("requirements.txt"), *listed("requirements-test.txt")]
    assert not {line.partition(";")[0].strip() for line in wanted} - pins.keys()
