#!/usr/bin/env python3
"""The one command: makes .venv on first use, then starts what was asked for in it.

    python3 run.py [serve] [options]          the node editor on 127.0.0.1:8188
                                              (--port N, --models DIR, --no-browser)
    python3 run.py render WORKFLOW [options]  the same workflow file without the editor: PNGs out
                                              (--set NAME=VALUE, --out DIR, --models DIR)
    python3 run.py test [pytest arguments]    the tests
    python3 run.py train [options]            the miniature's training
    python3 run.py bench [NAME [options]]     a measurement: tables, pictures, with --json FILE every figure;
                                              without NAME the list of them
    python3 run.py COMMAND --help             all options of one command

Standard library only: this file runs before anything is installed. It must also parse on Pythons that are far
too old (3.6), because they can only be told so by a file that they can read: no annotation with `|` or
`list[...]`, no walrus, no `from __future__ import annotations`.
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
# The tested transformers, numpy and pillow ask for it; inside ComfyUI the pack itself is content with 3.10.
OLDEST_PYTHON = (3, 11)

REQUIREMENTS = {"base": "requirements.txt", "test": "requirements-test.txt"}
# Files inside .venv: the first stands there from .venv's first second until its first complete installation,
# the others say, as a hash of the requirement files, what was installed completely.
UNFINISHED = "rectiflux-unfinished"
PROOF = {"base": "rectiflux-installed", "test": "rectiflux-installed-test"}

CANNOT_CONNECT = (
    "after connection broken by",
    "ConnectionError",
    "ConnectTimeout",
    "Max retries exceeded",
    "Read timed out",
)


class SetupError(Exception):
    """One sentence for the person at the keyboard: what is missing and what to do."""


def check_python(version: tuple = sys.version_info[:3]) -> None:
    """Refuse a Python that cannot hold the tested versions. Raises SetupError."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            "Rectiflux needs Python {}.{} or newer, this is {} ({}); install a newer one from python.org or "
            "your package manager and start run.py with it.".format(
                OLDEST_PYTHON[0], OLDEST_PYTHON[1], ".".join(str(part) for part in version), sys.executable
            )
        )


def check_modules() -> None:
    """Refuse a Python without venv or pip inside (Debian and Ubuntu ship it so). Raises SetupError."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python ({sys.executable}) comes without the module `{module}` that makes .venv; "
                "install it (Debian, Ubuntu: sudo apt install python3-venv) and run the same command again."
            )


def venv_python() -> Path:
    """The interpreter inside .venv, whether or not it exists."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(part: str) -> str:
    """Hash of the files that say what `part` ("base" or "test") of .venv has to hold."""
    digest = hashlib.sha256()
    for name in (REQUIREMENTS[part], "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def is_installed(part: str) -> bool:
    """Whether `part` was installed completely, and from the requirement files as they are now."""
    proof = VENV / PROOF[part]
    return venv_python().exists() and proof.is_file() and proof.read_text() == fingerprint(part)


def say(message: str) -> None:
    """Tell the person; stdout stays free for what a command prints."""
    print(message, file=sys.stderr, flush=True)


class OneAtATime:
    """A lock on .venv held for a `with` block; the system frees it however the holder ends."""

    def __enter__(self) -> None:
        self.file = open(ROOT / ".venv.lock", "a+")
        if not self._try():
            say("another start is setting up .venv; waiting for it ...")
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
    """An environment with a working interpreter and pip in .venv.

    One that this program began and never finished (the first run was interrupted) starts over from nothing;
    so does one whose interpreter is gone (the system's Python was upgraded). Any other is kept: what it
    lacks, pip adds. Raises SetupError.
    """
    unfinished = VENV / UNFINISHED
    if venv_python().exists() and not unfinished.exists():
        return
    ours = unfinished.exists() or (VENV / "pyvenv.cfg").exists()
    if VENV.exists() and not ours:
        raise SetupError(f"{VENV} is no Python environment; move it away and run the same command again.")
    if in_venv():
        raise SetupError("the active .venv is incomplete; run `deactivate`, then the same command again.")
    check_modules()
    if VENV.exists():
        say("the environment in .venv is incomplete: making it anew ...")
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    unfinished.touch()
    command = [sys.executable, "-m", "venv", str(VENV)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode != 0:
        lines = made.stdout.decode(errors="replace").strip().splitlines() or ["no message"]
        raise SetupError(f"making .venv with {sys.executable} failed: {lines[-1].strip()}")


def explain_pip(code: int, errors: str) -> str:
    """One sentence for pip's exit code and what it wrote to stderr."""
    last = [line for line in errors.splitlines() if line.startswith("ERROR:")] or ["see its output above"]
    if "No space left on device" in errors or "not enough space" in errors:
        return (
            "the disk is full: the packages need 2 GB, with a CUDA build of torch 8 GB; free some, run again."
        )
    if any(sign in errors for sign in CANNOT_CONNECT):
        return (
            "pip cannot reach its package index; check the network or pip's proxy settings, then run again."
        )
    version = "{}.{}".format(*sys.version_info[:2])
    if "No matching distribution found" in errors:
        return f"{last[-1]}: no build for Python {version} on this machine; try another Python from 3.11 on."
    if "ResolutionImpossible" in errors:  # so pip says it where constraints.txt names the version
        what = errors.partition("Cannot install ")[2].partition(" because")[0] or "a package"
        return (
            f"pip's package index has no build of the tested {what} for Python {version} on this machine; "
            "try another Python from 3.11 on, or check which index pip is set to."
        )
    return f"pip ended with code {code}: {last[-1]}"


def pip_install(arguments: list) -> None:
    """Run pip in .venv, its output on stderr as it comes. Raises SetupError with the reason when it fails."""
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
    """Bring `part` of .venv up to the requirement files; at once when it already is. Raises SetupError."""
    if is_installed(part):
        return
    with OneAtATime():
        if is_installed(part):  # by the start that this one waited for
            return
        if part == "base":
            make_venv()
        say(
            "setting up Rectiflux in .venv (first use and after updates: some minutes) ..."
            if part == "base"
            else "installing what the tests and some benchmarks need into .venv ..."
        )
        proof = VENV / PROOF[part]
        if proof.exists():
            proof.unlink()
        # torch is named here and not in requirements.txt, which must never move an artist's own torch
        wanted = (["torch"] if part == "base" else []) + ["-r", REQUIREMENTS[part]]
        pip_install(wanted)
        proof.write_text(fingerprint(part))
        if part == "base" and (VENV / UNFINISHED).exists():
            (VENV / UNFINISHED).unlink()


def let_threads_sleep(environment: dict) -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has said how they should.

    By default they spin, and beside another busy process on two cores a render takes 20 times as long. torch
    reads this once, when it is imported.
    """
    if not any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def in_venv() -> bool:
    """Whether this interpreter is the one in .venv."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def continue_in_venv(arguments: list) -> int:
    """Run .venv's Python with these arguments in place of this process; on Windows below it."""
    environment = dict(os.environ)
    # on macOS this one would send the interpreter back to the prefix that run.py was started from
    environment.pop("__PYVENV_LAUNCHER__", None)
    let_threads_sleep(environment)
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
    """What is in benchmarks/: name -> (module, what it measures, the part of .venv that it needs).

    A benchmark is a file with a function `main(arguments)`; full_size.py is called full-size. The first line
    of its docstring says what it measures, and NEEDS = "test" that it takes a test tool too. All of it is
    read from the text, so that the list needs no environment.
    """
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            continue  # what several benchmarks share
        part = "base"
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NEEDS":
                part = ast.literal_eval(node.value)
        about = (ast.get_docstring(tree) or "").split("\n")[0]
        found[path.stem.replace("_", "-")] = ("benchmarks." + path.stem, about, part)
    return found


def list_benchmarks() -> None:
    """Print the benchmarks there are."""
    found = benchmarks()
    width = max(map(len, found))
    print("python3 run.py bench NAME [options], where NAME is one of these (NAME --help tells its options):")
    for name, (_, about, _) in found.items():
        print(f"    {name:{width}}  {about}")


def part_needed(command: str, arguments: list) -> str:
    """The part of .venv that a command needs beyond the base. Raises SetupError for an unknown benchmark."""
    if command != "bench":
        return "test" if command == "test" else "base"
    found = benchmarks()
    if arguments[0] not in found:
        raise SetupError("run.py bench has no {!r}; it has {}.".format(arguments[0], ", ".join(found)))
    return found[arguments[0]][2]


def module_of(command: str, arguments: list) -> tuple:
    """(module, arguments of its main) of a command."""
    if command == "bench":
        return benchmarks()[arguments[0]][0], arguments[1:]
    modules = {"serve": "host.serve", "render": "host.render", "train": "miniature.cli"}
    return modules[command], arguments


def dispatch(command: str, arguments: list) -> int:
    """Run one command with the packages of .venv around us; its exit code.

    Raises SetupError when one of them is missing or does not load.
    """
    name, arguments = module_of(command, arguments)
    try:
        load_pack()
        module = importlib.import_module(PACKAGE + "." + name)
    except (ImportError, OSError) as error:  # OSError: a library that torch wants is not on this system
        if (getattr(error, "name", None) or "").split(".")[0] == PACKAGE:
            raise  # a mistake of our own
        what = " ".join(str(error).split())
        raise SetupError(
            f"the packages in .venv do not load ({what}); delete the folder {VENV} and run the same command "
            "again, which installs them anew."
        ) from error
    return module.main(arguments) or 0


def side_by_side(arguments: list) -> list:
    """What has pytest run everything in two processes, for two cores; nothing where `arguments` name a part.

    A test computes on one core. Whoever says -n, or wants to see into a test (-s, --pdb), is left alone.
    """
    named = [argument.split("::")[0] for argument in arguments]
    alone = any(name.startswith(("-n", "-s", "--pdb", "--numprocesses")) for name in named)
    if alone or any((ROOT / name).exists() for name in named) or (os.cpu_count() or 1) < 2:
        return []
    return ["-n", "2", "--dist", "worksteal"]


def split_command(argv: list) -> tuple:
    """(command, its arguments); no command means serve. Raises SetupError for an unknown one."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        return "serve", list(argv)
    if argv[0] in ("-h", "--help", "help"):
        return "help", []
    if argv[0] not in COMMANDS:
        raise SetupError("run.py has no command {!r}; it has {}.".format(argv[0], ", ".join(COMMANDS)))
    return argv[0], list(argv[1:])


def main(argv: list) -> int:
    """Set up what is missing, then run the command; the exit code."""
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
            return continue_in_venv(["-m", "pytest", *side_by_side(arguments), *arguments])
        if not in_venv():
            return continue_in_venv([str(ROOT / "run.py"), command, *arguments])
        let_threads_sleep(os.environ)
        return dispatch(command, arguments)
    except SetupError as error:
        say(f"run.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__mp_main__":  # in a worker process that a command spawned: it looks for rectiflux.* names
    load_pack()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
