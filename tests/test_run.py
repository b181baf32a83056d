"""run.py as a process: it creates environments, and pip fills them from wheels made here.

`Start` is a clone with run.py, requirement files, and a stand-in pack whose commands print their arguments.
Its package index is a folder of empty wheels; no test needs a network. Creating an environment takes seconds,
so most tests share one and restore it.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

RENDER = "import sys, probe\ndef main(argv): print('render', argv, sys.prefix); return 3 if argv else 0"
FULL_SIZE = '"""How large.\n\nMore."""\ndef main(argv): print(argv, __name__); return len(argv)'
THREADS = '"""Waiting."""\nimport os\ndef main(argv): print(os.environ.get(*argv or ["OMP_WAIT_POLICY"]))'
PYTEST = "import os, sys; print('pytest', sys.argv[1:], os.getcwd())"
PACK = {
    "__init__.py": "",
    "host/__init__.py": "",
    "host/serve.py": "def main(argv): print('serve', argv, __package__)",
    "host/render.py": RENDER,
    "flux_core/__init__.py": "",
    "flux_core/train/__init__.py": "",
    "miniature/cli.py": "def main(argv): print('train', argv)",
    "benchmarks/full_size.py": FULL_SIZE,
    "benchmarks/speed.py": '"""How fast."""\nNEEDS = "test"\ndef main(argv): print("fast")',
    "benchmarks/threads.py": THREADS,
    "benchmarks/report.py": '"""What they share."""\nSHARED = 1',
}


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel with these files."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text.encode())}\n"
        archive.writestr(f"{info}/RECORD", record)


class Start:
    """A fresh clone in a folder whose name is no module's, and an index with torch, probe and pytest."""

    def __init__(self, place: Path) -> None:
        self.root = place / "ComfyUI-my clone"
        self.index = place / "index"
        for name, text in PACK.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.copy(ROOT / "run.py", self.root)
        self.write("requirements.txt", "probe\n")
        self.write("requirements-test.txt", "pytest\n")
        self.write("constraints.txt", "torch==2.13.0\nprobe==1.0\npytest==9.0\n")
        wheel(self.index, "torch", "2.13.0", {"torch.py": ""})
        wheel(self.index, "torch", "2.99.0", {"torch.py": ""})
        wheel(self.index, "probe", "1.0", {"probe.py": "version = 1"})
        wheel(self.index, "probe", "1.1", {"probe.py": "version = 2"})
        wheel(self.index, "pytest", "9.0", {"pytest.py": PYTEST})
        self.errors = self.first = ""

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def environment(self, **changes: str) -> dict[str, str]:
        """pip's settings replaced by: nothing but the index."""
        unset = ("PIP_", "OMP_", "GOMP_", "KMP_", "ONEDNN_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PIP_CONFIG_FILE": os.devnull}
        return {**kept, **offline, **changes}

    def begin(self, *arguments: str, python: str = sys.executable, **changes: str) -> subprocess.Popen[str]:
        """run.py, started from another folder, with nobody at the keyboard."""
        return subprocess.Popen(
            [python, str(self.root / "run.py"), *arguments],
            env=self.environment(**changes),
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, code: int = 0, python: str = sys.executable, **changes: str) -> str:
        """What run.py printed; stderr is in `errors`."""
        process = self.begin(*arguments, python=python, **changes)
        printed, self.errors = process.communicate()
        assert process.returncode == code, printed + self.errors
        assert "Traceback" not in self.errors
        return printed

    @property
    def python(self) -> Path:
        return self.root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def installed(self) -> set[str]:
        """Names and versions of the index's packages in .venv."""
        code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        run = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return {name for name in run.stdout.split() if not name.startswith(("pip==", "setuptools=="))}

    def last_error(self) -> str:
        return self.errors.splitlines()[-1]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A clone after its first start. Tests that use it leave it ready."""
    start = Start(tmp_path_factory.mktemp("ready"))
    start("render")
    start.first = start.errors
    return start


@pytest.fixture
def run() -> ModuleType:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("rectiflux_run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_start_installs_and_later_ones_do_not_call_pip(ready: Start) -> None:
    assert ready.installed() >= {"torch==2.13.0", "probe==1.0"}
    assert "setting up Rectiflux in .venv" in ready.first
    assert ready("render", PIP_FIND_LINKS="").startswith(f"render [] {ready.root / '.venv'}")
    assert ready.errors == ""


def test_commands_get_their_arguments_and_give_their_exit_code(ready: Start) -> None:
    assert ready("--port", "1").strip() == "serve ['--port', '1'] rectiflux.host"
    assert ready("serve", "--help").strip() == "serve ['--help'] rectiflux.host"
    assert ready().strip() == "serve [] rectiflux.host"
    assert ready("train", "--steps=2").strip() == "train ['--steps=2']"
    assert ready("render", "w.json", "a b", code=3).startswith("render ['w.json', 'a b']")
    assert ready("train", python=str(ready.python)).strip() == "train []", "started by .venv's own Python"
    printed = ready("bench", "full-size", "--json", "a b", code=2)
    assert printed.strip() == "['--json', 'a b'] rectiflux.benchmarks.full_size"


def test_threads_sleep_while_waiting_unless_the_user_set_otherwise(ready: Start) -> None:
    for python in (sys.executable, str(ready.python)):
        assert ready("bench", "threads", python=python) == "PASSIVE\n"
        assert ready("bench", "threads", python=python, OMP_WAIT_POLICY="active") == "active\n"
        assert ready("bench", "threads", python=python, GOMP_SPINCOUNT="100") == "None\n"


def test_the_cache_of_compiled_kernels_is_bounded_unless_the_user_set_otherwise(ready: Start) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    for python in (sys.executable, str(ready.python)):
        assert ready("bench", "threads", name, python=python) == "128\n"
        assert ready("bench", "threads", name, python=python, **{name: "1024"}) == "1024\n"


def test_bench_installs_the_packages_of_a_benchmark(ready: Start) -> None:
    (ready.root / ".venv" / "rectiflux-installed-test").unlink(missing_ok=True)
    ready("bench", "full-size", PIP_FIND_LINKS="")
    assert ready.errors == ""
    assert ready("bench", "speed").splitlines()[-1] == "fast"
    assert "installing the packages of the tests" in ready.errors
    assert "pytest==9.0" in ready.installed()
    assert ready("bench", "speed", PIP_FIND_LINKS="").strip() == "fast" and ready.errors == ""


def test_tests_install_their_packages_first_and_run_in_the_root(ready: Start) -> None:
    printed = ready("test", "-k", "x y", "host/serve.py").splitlines()[-1]
    assert printed == f"pytest ['-k', 'x y', 'host/serve.py'] {ready.root}"
    assert "pytest==9.0" in ready.installed()
    ready("test", PIP_FIND_LINKS="")
    assert ready.errors == ""


@pytest.mark.parametrize(
    ("arguments", "cores", "together"),
    [
        ([], 2, True),
        (["-m", "not slow", "-x"], 16, True),
        ([], 1, False),
        (["tests/test_run.py"], 2, False),
        (["tests/test_run.py::test_help"], 2, False),
        (["-n", "4"], 4, False),
        (["--pdb"], 2, False),
    ],
)
def test_all_tests_run_in_two_processes(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], cores: int, together: bool
) -> None:
    """With two cores or more, unless the arguments select a part, set -n or need a single process."""
    monkeypatch.setattr(run.os, "cpu_count", lambda: cores)
    assert run.parallel_options(arguments) == (["-n", "2", "--dist", "worksteal"] if together else [])


def test_changed_requirements_are_installed_at_the_next_start(ready: Start) -> None:
    before = (ready.root / "constraints.txt").read_text()
    for text, version in ((before.replace("probe==1.0", "probe==1.1"), "probe==1.1"), (before, "probe==1.0")):
        ready.write("constraints.txt", text)
        ready("render")
        assert version in ready.installed()
        ready("render", PIP_FIND_LINKS="")
        assert ready.errors == ""


@pytest.mark.slow
def test_first_starts_that_are_killed_or_run_at_once(start: Start) -> None:
    """An incomplete environment is created again; of two processes, one waits for the other."""
    first = start.begin("render")
    while not (start.root / ".venv" / "pyvenv.cfg").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    both = [start.begin("render"), start.begin("render")]
    ends = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert all(printed.startswith("render []") for printed, _ in ends)
    printed = "".join(errors for _, errors in ends)
    assert printed.count("the environment in .venv is incomplete") == 1
    assert printed.count("another process is setting up .venv") == 1
    assert start.installed() == {"torch==2.13.0", "probe==1.0"}


@pytest.mark.slow
def test_an_environment_whose_python_is_missing_is_created_again(ready: Start) -> None:
    ready.python.unlink()
    assert ready("render").startswith("render []")
    assert "the environment in .venv is incomplete" in ready.errors


@pytest.mark.slow
def test_an_environment_of_the_users_own_is_kept(start: Start) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(start.root / ".venv")], check=True)
    (start.root / ".venv" / "keepsake").touch()
    start("render")
    assert (start.root / ".venv" / "keepsake").exists() and "probe==1.0" in start.installed()


OFFLINE = {"PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**OFFLINE, "PIP_RETRIES": "1"}, "pip cannot reach its package index"),
        ({}, "No matching distribution found for nowhere-to-be-found: no build for Python"),
    ],
)
def test_a_package_that_cannot_be_installed(ready: Start, changes: dict[str, str], reason: str) -> None:
    before = (ready.root / "requirements.txt").read_text()
    ready.write("requirements.txt", before + "nowhere-to-be-found\n")
    ready("render", code=1, **changes)
    assert reason in ready.last_error()
    ready.write("requirements.txt", before)
    assert ready("render").startswith("render []")


@pytest.mark.slow
def test_no_build_of_a_constrained_package(start: Start) -> None:
    """pip then reports conflicting dependencies. On the first start, so that .venv stays incomplete, too."""
    shutil.rmtree(start.index)
    start.index.mkdir()
    start("render", code=1)
    assert "pip's package index has no build of the tested torch" in start.last_error()


def test_packages_that_cannot_be_imported(ready: Start) -> None:
    probe = next(ready.root.glob(".venv/**/site-packages/probe.py"))
    before = probe.read_text()
    for broken, reason in (
        ("import nowhere", "No module named 'nowhere'"),
        ("raise OSError('libtorch.so:\\n not here')", "libtorch.so: not here"),
    ):
        probe.write_text(broken)
        ready("render", code=1)
        assert f"({reason}); delete the folder {ready.root / '.venv'}" in ready.last_error()
    probe.write_text(before)


def test_pips_other_failures(run: ModuleType) -> None:
    disk = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    assert run.explain_pip(1, disk).startswith("the disk is full: the packages need 2 GB")
    assert run.explain_pip(2, "WARNING: x\nERROR: broken thing\n").endswith("code 2: ERROR: broken thing")
    assert run.explain_pip(2, "").endswith("code 2: see its output above")


def test_no_venv_module(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(run, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / name).touch()
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    assert run.main(["render"]) == 1
    assert "has no module `ensurepip`" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()


def test_a_folder_in_the_way(start: Start) -> None:
    (start.root / ".venv").mkdir()
    (start.root / ".venv" / "thesis.txt").touch()
    start("render", code=1)
    assert f"{start.root / '.venv'} is not a Python environment" in start.last_error()
    assert (start.root / ".venv" / "thesis.txt").exists()


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 12), (2, 7, 18)])
def test_a_python_that_is_too_old(run: ModuleType, version: tuple[int, int, int]) -> None:
    with pytest.raises(run.SetupError, match=".".join(map(str, version))):
        run.check_python(version)
    run.check_python((3, 11, 0))


def test_a_python_that_is_too_old_can_parse_run_py() -> None:
    """The grammar of 3.6, no annotation that 3.6 cannot evaluate, standard library only."""
    tree = ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        if isinstance(node, (ast.arg, ast.FunctionDef)):
            annotation = node.annotation if isinstance(node, ast.arg) else node.returns
            assert annotation is None or isinstance(annotation, (ast.Name, ast.Constant)), ast.dump(node)
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_help_lists_and_unknown_names_need_no_environment(start: Start) -> None:
    """Benchmarks are the files with a main function, listed with the first line of their docstring."""
    assert "python3 run.py render WORKFLOW" in start("--help")
    for arguments in (("bench",), ("bench", "--help"), ("bench", "-h")):
        assert start(*arguments).splitlines()[1:] == [
            "    full-size  How large.",
            "    speed      How fast.",
            "    threads    Waiting.",
        ]
    start("frob", code=1)
    assert start.last_error().endswith("'frob'; the commands are serve, render, test, train, bench.")
    for name in ("frob", "report", "full_size", "--quick"):
        start("bench", name, code=1)
        assert start.last_error().endswith(f"{name!r}; the benchmarks are full-size, speed, threads.")
    assert not (start.root / ".venv").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_without_a_traceback(start: Start, unbuffered: str) -> None:
    """As in `run.py bench | head -0`, whether Python writes at once or at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    for argument in ("--help", "bench"):
        command = [sys.executable, str(start.root / "run.py"), argument]
        environment = start.environment(PYTHONUNBUFFERED=unbuffered)
        run = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
        assert run.returncode == 1 and len(run.stderr.splitlines()) == 1, run.stderr
        assert "cannot be printed" in run.stderr
    os.close(writer)


def test_every_benchmark_has_a_description(run: ModuleType) -> None:
    found = run.benchmarks()
    assert {"flow", "speed"} <= found.keys()
    for name, (module, description, part) in found.items():
        assert module == "benchmarks." + name.replace("-", "_")
        assert 10 < len(description) < 100 and description.endswith(".")
        assert part in run.REQUIREMENTS
    assert found["speed"][2] == "test" and found["flow"][2] == "base"
