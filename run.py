#!/usr/bin/env python3
"""The one command: creates .venv on first use, then runs the requested command in it.

    python3 run.py [serve] [options]          the node editor on 127.0.0.1:8188
                                              (--port N, --models DIR, --no-browser)
    python3 run.py render WORKFLOW [options]  a workflow file without the editor: saves PNGs
                                              (--set NAME=VALUE, --out DIR, --models DIR)
    python3 run.py test [pytest arguments]    the tests
    python3 run.py train [options]            the training of the miniature models
    python3 run.py bench [NAME [options]]     a benchmark: tables and figures, all values with --json FILE;
                                              without NAME a list of the benchmarks
    python3 run.py COMMAND --help             all options of one command

Standard library only: this file runs before anything is installed. It must also parse on Python 3.6, so that
an old Python can print that it is too old: no annotation with `|` or `list[...]`, no walrus, no
`from __future__ import annotations`.
"""

import ast
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PACKAGE = "rectiflux"  # the pack's import name, whatever the folder is called
COMMANDS = ("serve", "render", "test", "train", "bench")
# Required by the tested transformers, numpy and pillow; inside ComfyUI the pack itself runs on 3.10.
OLDEST_PYTHON = (3, 11)

REQUIREMENTS = {"base": "requirements.txt", "test": "requirements-test.txt"}
# Marker files inside .venv: UNFINISHED exists until the first installation is complete; INSTALLED contain the
# hash of the requirement files from which a part was installed completely.
UNFINISHED = "rectiflux-unfinished"
INSTALLED = {"base": "rectiflux-installed", "test": "rectiflux-installed-test"}

CONNECTION_ERRORS = (
    "after connection broken by",
    "ConnectionError",
    "ConnectTimeout",
    "Max retries exceeded",
    "Read timed out",
)


class SetupError(Exception):
    """One sentence for the user: what is missing and what to do."""


def check_python(version: tuple = sys.version_info[:3]) -> None:
    """Raise SetupError on a Python for which the tested versions are not available."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            "Rectiflux needs Python {}.{} or newer, this is {} ({}); install a newer one from python.org or "
            "your package manager and start run.py with it.".format(
                OLDEST_PYTHON[0], OLDEST_PYTHON[1], ".".join(str(part) for part in version), sys.executable
            )
        )


def check_modules() -> None:
    """Raise SetupError on a Python without venv or pip (as shipped by Debian and Ubuntu)."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python ({sys.executable}) has no module `{module}`, which creates .venv; "
                "install it (Debian, Ubuntu: sudo apt install python3-venv) and run the same command again."
            )


def venv_python() -> Path:
    """The interpreter inside .venv, whether or not it exists."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(part: str) -> str:
    """Hash of the files that list the packages of `part` ("base" or "test")."""
    digest = hashlib.sha256()
    for name in (REQUIREMENTS[part], "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def is_installed(part: str) -> bool:
    """Whether `part` was installed completely from the current requirement files."""
    marker = VENV / INSTALLED[part]
    return venv_python().exists() and marker.is_file() and marker.read_text() == fingerprint(part)


def say(message: str) -> None:
    """Print to stderr; stdout is reserved for the output of commands."""
    print(message, file=sys.stderr, flush=True)


class InstallLock:
    """A lock on .venv for a `with` block; the system releases it even if the process is killed."""

    def __enter__(self) -> None:
        self.file = open(ROOT / ".venv.lock", "a+")
        if not self._try():
            say("another process is setting up .venv; waiting for it ...")
            self._wait()

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _try(self) -> bool:
        try:
            if os.name == "nt":
                import msvcrt

                self.file.seek(0)
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _wait(self) -> None:
        while not self._try():
            time.sleep(0.5)


def make_venv() -> None:
    """Create an environment with an interpreter and pip in .venv.

    One whose creation was interrupted, or whose interpreter no longer exists (after an upgrade of Python), is
    deleted and created again. Any other is kept; pip adds missing packages. Raises SetupError.
    """
    unfinished = VENV / UNFINISHED
    if venv_python().exists() and not unfinished.exists():
        return
    is_environment = unfinished.exists() or (VENV / "pyvenv.cfg").exists()
    if VENV.exists() and not is_environment:
        raise SetupError(f"{VENV} is not a Python environment; move it away and run the same command again.")
    if in_venv():
        raise SetupError("the active .venv is incomplete; run `deactivate`, then the same command again.")
    check_modules()
    if VENV.exists():
        say("the environment in .venv is incomplete and will be created again ...")
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    unfinished.touch()
    command = [sys.executable, "-m", "venv", str(VENV)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if process.returncode != 0:
        lines = process.stdout.decode(errors="replace").strip().splitlines() or ["no message"]
        raise SetupError(f"creating .venv with {sys.executable} failed: {lines[-1].strip()}")


def explain_pip(code: int, errors: str) -> str:
    """One sentence for pip's exit code and its output on stderr."""
    last = [line for line in errors.splitlines() if line.startswith("ERROR:")] or ["see its output above"]
    if "No space left on device" in errors or "not enough space" in errors:
        return (
            "the disk is full: the packages need 2 GB, with a CUDA build of torch 8 GB; free some space and "
            "run again."
        )
    if any(sign in errors for sign in CONNECTION_ERRORS):
        return (
            "pip cannot reach its package index; check the network or pip's proxy settings, then run again."
        )
    version = "{}.{}".format(*sys.version_info[:2])
    if "No matching distribution found" in errors:
        return f"{last[-1]}: no build for Python {version} on this machine; try another Python from 3.11 on."
    if "ResolutionImpossible" in errors:  # pip's message if constraints.txt specifies the version
        what = errors.partition("Cannot install ")[2].partition(" because")[0] or "a package"
        return (
            f"pip's package index has no build of the tested {what} for Python {version} on this machine; "
            "try another Python from 3.11 on, or check pip's index setting."
        )
    return f"pip ended with code {code}: {last[-1]}"


def pip_install(arguments: list) -> None:
    """Run pip in .venv with its output on stderr. Raises SetupError with the reason when it fails."""
    options = ["--disable-pip-version-check", "--no-input", "-c", "constraints.txt"]
    command = [str(venv_python()), "-m", "pip", "install", *options, *arguments]
    errors = []
    streams = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=str(ROOT), **streams) as pip:
        for raw in pip.stderr:
            line = raw.decode(errors="replace")
            errors.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()
    if pip.returncode != 0:
        reason = explain_pip(pip.returncode, "".join(errors))
        raise SetupError(f"the installation into .venv failed: {reason}")


def install(part: str) -> None:
    """Install `part` of .venv unless it is up to date with the requirement files. Raises SetupError."""
    if is_installed(part):
        return
    with InstallLock():
        if is_installed(part):  # by the process that held the lock
            return
        if part == "base":
            make_venv()
        say(
            "setting up Rectiflux in .venv (on first use and after updates; takes some minutes) ..."
            if part == "base"
            else "installing the packages of the tests and some benchmarks into .venv ..."
        )
        marker = VENV / INSTALLED[part]
        if marker.exists():
            marker.unlink()
        # torch is listed here and not in requirements.txt, which must never replace the torch of a ComfyUI
        packages = (["torch"] if part == "base" else []) + ["-r", REQUIREMENTS[part]]
        pip_install(packages)
        marker.write_text(fingerprint(part))
        if part == "base" and (VENV / UNFINISHED).exists():
            (VENV / UNFINISHED).unlink()


def set_library_defaults(environment: dict) -> None:
    """Set what torch's libraries read once, at import, unless the user has set it.

    OpenMP's threads sleep while waiting; by default they spin: beside another busy process on two cores a
    render takes 20 times as long. oneDNN caches 128 compiled kernels; each image size and weight format
    needs 16 to 30 of its own, and its default of 1024 takes 60 MB more.
    """
    if not any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def in_venv() -> bool:
    """Whether this interpreter is the one in .venv."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def continue_in_venv(arguments: list) -> int:
    """Replace this process by .venv's Python with these arguments; on Windows, run it as a child."""
    environment = dict(os.environ)
    # on macOS this variable would make the interpreter use the prefix that run.py was started from
    environment.pop("__PYVENV_LAUNCHER__", None)
    set_library_defaults(environment)
    command = [str(venv_python()), *arguments]
    if os.name == "nt":  # execv on Windows returns to the shell at once
        return subprocess.run(command, env=environment).returncode
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
    return 0  # never reached


def load_pack() -> None:
    """Import the pack by its path under the name `rectiflux`, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, str(ROOT / "__init__.py"), submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


def benchmarks() -> dict:
    """The benchmarks in benchmarks/: {name: (module, description, the part of .venv it needs)}.

    A benchmark is a file with a function `main(arguments)`; full_size.py is named full-size. Its description
    is the first line of its docstring; NEEDS = "test" means that it uses a test package. Files are parsed and
    not imported, so that listing them needs no environment.
    """
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            continue  # a module that benchmarks share
        part = "base"
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NEEDS":
                part = ast.literal_eval(node.value)
        description = (ast.get_docstring(tree) or "").split("\n")[0]
        found[path.stem.replace("_", "-")] = ("benchmarks." + path.stem, description, part)
    return found


def list_benchmarks() -> None:
    """Print the names and descriptions of the benchmarks."""
    found = benchmarks()
    width = max(map(len, found))
    print("python3 run.py bench NAME [options], where NAME is one of these (NAME --help lists its options):")
    for name, (_, description, _) in found.items():
        print(f"    {name:{width}}  {description}")


def part_needed(command: str, arguments: list) -> str:
    """The part of .venv that a command needs beyond the base. Raises SetupError for an unknown benchmark."""
    if command != "bench":
        return "test" if command == "test" else "base"
    found = benchmarks()
    if arguments[0] not in found:
        raise SetupError(
            "unknown benchmark {!r}; the benchmarks are {}.".format(arguments[0], ", ".join(found))
        )
    return found[arguments[0]][2]


def module_of(command: str, arguments: list) -> tuple:
    """(module, arguments for its main) of a command."""
    if command == "bench":
        return benchmarks()[arguments[0]][0], arguments[1:]
    modules = {"serve": "host.serve", "render": "host.render", "train": "miniature.cli"}
    return modules[command], arguments


def dispatch(command: str, arguments: list) -> int:
    """Run one command inside .venv; returns its exit code.

    Raises SetupError when a package is missing or cannot be imported.
    """
    name, arguments = module_of(command, arguments)
    try:
        load_pack()
        module = importlib.import_module(PACKAGE + "." + name)
    except (ImportError, OSError) as error:  # OSError: a shared library that torch needs is missing
        if (getattr(error, "name", None) or "").split(".")[0] == PACKAGE:
            raise  # a bug in this pack
        reason = " ".join(str(error).split())
        raise SetupError(
            f"the packages in .venv cannot be imported ({reason}); delete the folder {VENV} and run the same "
            "command again to reinstall them."
        ) from error
    return module.main(arguments) or 0


def parallel_options(arguments: list) -> list:
    """Options for pytest to run all tests in two processes; none if `arguments` select a part or set -n.

    A test computes on one core. -s and --pdb need a single process.
    """
    paths = [argument.split("::")[0] for argument in arguments]
    single = any(path.startswith(("-n", "-s", "--pdb", "--numprocesses")) for path in paths)
    if single or any((ROOT / path).exists() for path in paths) or (os.cpu_count() or 1) < 2:
        return []
    return ["-n", "2", "--dist", "worksteal"]


def split_command(argv: list) -> tuple:
    """(command, its arguments); the default command is serve. Raises SetupError for an unknown one."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        return "serve", list(argv)
    if argv[0] in ("-h", "--help", "help"):
        return "help", []
    if argv[0] not in COMMANDS:
        raise SetupError("unknown command {!r}; the commands are {}.".format(argv[0], ", ".join(COMMANDS)))
    return argv[0], list(argv[1:])


def main(argv: list) -> int:
    """Install what is missing, then run the command; returns the exit code."""
    try:
        command, arguments = split_command(argv)
        if command == "help":
            print(__doc__.split("\n\n")[1])
            return 0
        check_python()
        if command == "bench" and (not arguments or arguments[0] in ("-h", "--help")):
            list_benchmarks()
            return 0
        part = part_needed(command, arguments)
        install("base")
        install(part)
        if command == "test":
            os.chdir(str(ROOT))
            return continue_in_venv(["-m", "pytest", *parallel_options(arguments), *arguments])
        if not in_venv():
            return continue_in_venv([str(ROOT / "run.py"), command, *arguments])
        set_library_defaults(os.environ)
        return dispatch(command, arguments)
    except SetupError as error:
        say(f"run.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def start(argv: list) -> int:
    """Run main; where nobody reads the output any more, as with `| head`, one sentence and exit code 1."""
    try:
        try:
            return main(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError as error:
        sys.stdout = None  # or Python would flush it again at exit and fail again
        say(f"run.py: the rest of the output cannot be printed: {error}")
        return 1


if __name__ == "__mp_main__":  # in a worker process that a command spawned, which unpickles rectiflux.* names
    load_pack()

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
