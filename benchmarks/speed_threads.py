"""Case `threads` of `bench speed`: what OMP_WAIT_POLICY=PASSIVE, which run.py sets, gains beside other load.

Waiting OpenMP threads spin by default, and on a busy machine they keep the threads that they wait for off the
cores. The demo (mini-dev, 28 steps, 128 px) and one block of each kind at FLUX.1's width run in child
processes, one for each policy, on an idle machine and beside a spinning process on each core but one. The
policy is read when torch is imported, hence the child processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer

import torch
from torch import Tensor

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.pipeline import text_to_image
from ..miniature.evaluate import FAMILY
from .generate import check_files, load_models, model_files
from .interleaved import Clock, Effort, Run, compare
from .speed_inputs import FULL, QUICK, Inputs, random_model
from .speed_settings import TIME_IS_UP, Note, Outcome, Settings, Skipped

ROOT = Path(__file__).resolve().parents[1]
POLICIES: dict[str, dict[str, str]] = {"passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "default": {}}
"""Name -> the variables of a child that choose how its threads wait."""
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WORKLOADS = ("demo", "blocks")
RUN_LIMIT = 120.0
"""Seconds after which a child that has not answered is killed."""
SPIN = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
START = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="__mp_main__")  # load the pack without run.py's own environment settings
from rectiflux.benchmarks.speed_threads import serve
serve(*sys.argv[2:])
"""


def threads(settings: Settings, count: int | None = None) -> Iterator[Outcome]:
    """Ratios of the default policy's time over PASSIVE's, idle and busy, with `count` threads of torch."""
    count = count or torch.get_num_threads()
    if settings.device.type != "cpu":
        yield Skipped("threads", "for --device cpu")
        return
    if count < 2:
        yield Skipped("threads", "one thread has no other to wait for; run with --threads 2 or more")
        return
    for workload in WORKLOADS:
        case = f"threads-{workload}"
        if settings.is_time_up:
            yield Skipped(case, TIME_IS_UP)
            continue
        try:
            if workload == "demo":
                check_files(model_files(settings.models, "dev"))
            yield from _compare(case, workload, count, settings)
        except (OSError, ValueError) as error:
            yield Skipped(case, str(error))


def _compare(case: str, workload: str, count: int, settings: Settings) -> Iterator[Outcome]:
    """Raises OSError where a child process fails."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [
            stack.enter_context(Worker(workload, folder / name, variables, count, settings))
            for name, variables in POLICIES.items()
        ]
        for worker in workers:
            worker.wait()
        passive, default = (torch.load(worker.result) for worker in workers)
        error = float((passive.double() - default.double()).abs().max())
        yield Note(f"{case}: largest difference between the policies {error:.1e}, {count} threads")
        runs = [worker.run for worker in workers]
        effort = Effort(settings.budget / 2, at_least=1, warm=True)
        for load, processes in (("idle", 0), ("busy", spinners(settings.quick))):
            if settings.is_time_up:
                yield Skipped(f"{case}-{load}", TIME_IS_UP)
                continue
            note = "theirs with OMP_WAIT_POLICY unset" + (f", beside {processes} busy" if processes else "")
            with busy_cores(processes):
                yield compare(f"{case}-{load}", *runs, Clock(), effort, note)


def spinners(quick: bool) -> int:
    """The number of busy processes: one on each core but one, at least one."""
    return 1 if quick else max(1, (os.cpu_count() or 1) - 1)


@contextmanager
def busy_cores(count: int) -> Iterator[list[subprocess.Popen]]:
    """Have that many processes compute during a `with` block; each also ends by itself after a while."""
    command = [sys.executable, "-c", SPIN.format(seconds=10 * RUN_LIMIT)]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


class Worker:
    """A child process that loads a workload, runs it once, then once for each `run()`."""

    def __init__(
        self, workload: str, result: Path, variables: dict[str, str], count: int, settings: Settings
    ) -> None:
        """`result` is where the child stores its first output; `variables` choose how its threads wait."""
        self.result, self._log = result, result.with_suffix(".log")
        environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
        script = [sys.executable, "-c", START, str(ROOT / "run.py")]
        options = [workload, str(result), str(count), str(settings.models), "quick" if settings.quick else ""]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*script, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment, **variables},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self) -> None:
        """Run the workload once. Raises what `wait` raises."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.wait()

    def wait(self) -> None:
        """Wait until the child has run once. Raises OSError where it fails or exceeds RUN_LIMIT."""
        assert self._process.stdout is not None
        limit = Timer(RUN_LIMIT, self._process.kill)
        limit.start()
        answer = self._process.stdout.readline()
        limit.cancel()
        if answer != "done\n":
            last = (self._log.read_text().strip().splitlines() or ["no message"])[-1]
            raise OSError(f"the child process failed or took more than {RUN_LIMIT:.0f} s: {last}")


@dataclass(frozen=True)
class Workload:
    """What a child process computes."""

    name: str
    models: Path
    quick: bool

    @torch.no_grad()
    def load(self) -> Run:
        """The computation as a function that returns a tensor."""
        return self._demo() if self.name == "demo" else self._blocks()

    def _demo(self) -> Run:
        """An image by mini-dev as `run.py render` makes it."""
        models, dev = load_models(model_files(self.models, "dev")), FAMILY["dev"]
        pack_weights(models.transformer)
        steps = 1 if self.quick else dev.steps

        def run() -> Tensor:
            image = text_to_image(
                models,
                "a red circle left of a blue square",
                width=128,
                height=128,
                steps=steps,
                seed=7,
                guidance=dev.guidance,
                solver=dev.solver,
                shift=dev.shift,
            )
            return ((image + 1) * 127.5).round().byte()

        return run

    def _blocks(self) -> Run:
        """A step of one double and one single block, 512 text tokens, 256 px, fp32."""
        spec = replace(QUICK if self.quick else FULL, depth=1, depth_single=1)
        model = random_model(spec, torch.float32, torch.device("cpu"))
        inputs = Inputs(model, *((64, 16) if self.quick else (256, 512)))
        pack_weights(model)
        return inputs.our_step(model)


@torch.no_grad()
def serve(name: str, result: str, count: str, models: str, quick: str) -> None:
    """In the child: store the first output, then compute again for each line on standard input."""
    torch.set_num_threads(int(count))
    torch.manual_seed(0)
    run = Workload(name, Path(models), bool(quick)).load()
    torch.save(run(), result)
    print("done", flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)
