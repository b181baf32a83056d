"""A fuzzer of model files, in a process of its own: `python fuzz.py SEED INPUTS FOLDER` prints what broke.

Small valid files of every format are mutated in their bytes, headers, shapes, dtypes, names, metadata and
JSON, and loaded. A load must end, within 5 s of CPU time and without memory beyond the input's size and
64 MB, in a model or in one line of a ValueError, TypeError or OSError. One JSON object a line is printed for
each input that breaks this, and at the end the counts.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz_seeds import Seed

SECONDS, EXTRA_BYTES, MAX_MESSAGE = 5, 64 << 20, 600
NASTY_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 64) - 1,
    10**30,
)
NASTY_TEXTS = ("", "\n", "a" * 5000, "\u0000", "ü" * 300, "..", "/", "nan", "1e400", "9" * 5000, "[" * 3000)
NASTY_VALUES = (*NASTY_NUMBERS, *NASTY_TEXTS, None, True, [], {}, [[]], {"a": {}}, 0.5, [0] * 2000)

Mutate = Callable[[random.Random, bytes], bytes]


class Hang(BaseException):
    """An input took more CPU time than it may."""


# Mutations of bytes


def flip(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, most often in the first 2,000."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        limit = len(changed) if chance.random() < 0.2 else min(2000, len(changed))
        changed[chance.randrange(limit)] = chance.randrange(256)
    return bytes(changed)


def cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def extend(chance: random.Random, data: bytes) -> bytes:
    return data + chance.randbytes(chance.randint(1, 300))


def splice(chance: random.Random, data: bytes) -> bytes:
    """Bytes inserted, removed, or moved from elsewhere."""
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    count = chance.randint(1, 64)
    piece = chance.choice((b"", data[other : other + count], chance.randbytes(count)))
    return data[:at] + piece + data[at + chance.randint(0, count) :]


def integer(chance: random.Random, data: bytes) -> bytes:
    """Four or eight bytes near the start become a number that breaks sizes."""
    width = chance.choice((4, 8))
    at = chance.choice((0, 4, 8, 16, chance.randrange(min(len(data), 1500))))
    number = chance.choice(NASTY_NUMBERS) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


BYTES: tuple[Mutate, ...] = (flip, cut, extend, splice, integer)


# Mutations of JSON and of safetensors


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    elif isinstance(value, list):
        found += [(value, i) for i in range(len(value))]
    return found + [place for container, key in found for place in places(container[key])]


def change_json(chance: random.Random, value: Any) -> Any:
    """A copy with one to three places replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        all_places = places(value)
        if not all_places:
            return chance.choice(NASTY_VALUES)
        container, key = chance.choice(all_places)
        action = chance.random()
        if action < 0.6:
            container[key] = copy.deepcopy(chance.choice(NASTY_VALUES))
        elif action < 0.75 and isinstance(container, dict):
            container[chance.choice(NASTY_TEXTS)] = container.pop(key)
        elif action < 0.9:
            del container[key]
        else:
            other, name = chance.choice(all_places)
            container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else key)
    return value


def json_bytes(chance: random.Random, data: bytes) -> bytes:
    return json.dumps(change_json(chance, json.loads(data))).encode()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def header_json(chance: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    return joined(change_json(chance, header), body)


WIDTH = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def valid_header(chance: random.Random, data: bytes) -> bytes:
    """Tensors of other shapes, dtypes, names or metadata in a file whose header is right."""
    header, body = split(data)
    metadata = header.pop("__metadata__", {})
    entries = [(name, e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for name, e in header.items()]
    for _ in range(chance.randint(1, 3)):
        i = chance.randrange(len(entries))
        name, dtype, shape, values = entries[i]
        action = chance.randrange(7)
        if action == 0:
            name = chance.choice(
                [*NASTY_TEXTS, entries[chance.randrange(len(entries))][0] + ".x", name[::-1]]
            )
        elif action == 1:
            shape = chance.choice([shape[::-1], [], [*shape, 1], [1, *shape], [0, *shape], [len(values), 1]])
        elif action == 2:
            shape = [max(0, side + chance.choice((-1, 1, 5))) for side in shape]
        elif action == 3:
            dtype = chance.choice([*WIDTH])
        elif action == 4 and metadata:
            metadata[chance.choice([*metadata])] = str(chance.choice(NASTY_VALUES))
        elif action == 5:
            values = chance.randbytes(len(values))
        elif len(entries) > 1:
            del entries[i]
            continue
        count = WIDTH[dtype]
        for side in shape:
            count *= side
        entries[i] = (name, dtype, shape, values.ljust(count, b"\1")[:count] if count < 1 << 20 else values)
    made: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape, values in entries:
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        at += len(values)
    return joined(made, b"".join(values for *_, values in entries))


def inner_json(chance: random.Random, data: bytes) -> bytes:
    """The JSON in a tensor of a 4-bit weight's description, changed in place, else a valid header."""
    header, body = split(data)
    names = [name for name in header if ".quant_state." in name or name.endswith("comfy_quant")]
    if not names:
        return valid_header(chance, data)
    start, stop = header[chance.choice(names)]["data_offsets"]
    text = json.dumps(change_json(chance, json.loads(body[start:stop]))).encode()[: stop - start]
    return joined(header, body[:start] + text.ljust(stop - start) + body[stop:])


SAFETENSORS: tuple[Mutate, ...] = (*BYTES, header_json, valid_header, valid_header, valid_header, inner_json)
JSON: tuple[Mutate, ...] = (flip, cut, splice, json_bytes, json_bytes, json_bytes)
GGUF: tuple[Mutate, ...] = (*BYTES, flip, integer)


# The campaign


class Campaign:
    """Valid files below a folder, and what happens when each is mutated and loaded."""

    def __init__(self, seed: int, folder: Path) -> None:
        from fuzz_seeds import write_seeds

        self.chance, self.seed = random.Random(seed), seed
        self.seeds = write_seeds(folder)
        self.counts: Counter[str] = Counter()
        gc.freeze()  # the libraries: collections are quick from here on

    def run(self, inputs: int) -> None:
        for index in range(inputs):
            case = self.chance.choice(self.seeds)
            target = case.folder / self.chance.choice(case.mutated)
            kinds = {".json": JSON, ".gguf": GGUF}.get(target.suffix, SAFETENSORS)
            mutate = self.chance.choice(kinds)
            valid = target.read_bytes()
            _replace(target, mutate(self.chance, valid))
            what = f"seed {self.seed} input {index}: {case.folder.name}/{target.name} {mutate.__name__}"
            if (problem := self._loaded(case)) is not None:
                print(json.dumps({"input": what, "problem": problem}), flush=True)
            _replace(target, valid)
        print(json.dumps({"counts": self.counts}), flush=True)

    def _loaded(self, case: Seed) -> str | None:
        """What is wrong with how a load ended, or None."""
        size = sum(path.stat().st_size for path in case.folder.rglob("*") if path.is_file())
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        problem = None
        try:
            case.load(case.folder)
            self.counts["loaded"] += 1
        except (ValueError, TypeError, OSError) as error:
            self.counts["refused"] += 1
            text = str(error)
            if type(error) not in (ValueError, TypeError, FileNotFoundError):
                problem = f"{type(error).__name__}: {text[:300]}"
            elif not text or len(text.splitlines()) != 1 or len(text) > MAX_MESSAGE:
                problem = f"a message of {len(text)} characters: {text[:300]!r}"
        except BaseException as error:  # whatever else: PanicException and Hang are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _memory("VmHWM") - before
        if problem is None and grown > size + EXTRA_BYTES:
            problem = f"{grown:,} bytes for an input of {size:,}"
        return problem


def _replace(path: Path, data: bytes) -> None:
    """Write a new file in place of the one at `path`, which may still be mapped."""
    path.unlink()
    path.write_bytes(data)


def _memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def _hang(signal_number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s")


if __name__ == "__main__":
    seed, inputs, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    tests = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(tests), str(Path(__file__).parent)]
    import conftest  # noqa: F401  (it loads the pack)

    signal.signal(signal.SIGPROF, _hang)
    Campaign(seed, folder).run(inputs)
