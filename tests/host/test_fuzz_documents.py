"""Seeded malformed documents: each runs or is refused in one sentence, quickly and in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from rectiflux.host.execution import Executor
from rectiflux.host.registry import Registry
from rectiflux.host.validation import InvalidPrompt, validate
from rectiflux.host.workflow import WorkflowError, apply_settings, read_document

from ..fuzzing import fuzz_inputs, fuzz_seed
from .conftest import NODES
from .document_fuzzer import DocumentFuzzer, Input
from .graphs import INFO

COUNT, SEED = fuzz_inputs(300), fuzz_seed()
PATIENCE = 5.0  # seconds of processor time for a document, so that a busy machine does not matter
SPARE = 64 * 2**20  # bytes beyond the document's size
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


def outcome(path: Path, document: Input, info: dict[str, Any], executor: Executor) -> tuple[str, list[str]]:
    """(what happened, the sentences that the user reads)"""
    try:
        found = apply_settings(read_document(path), document.settings, info)
    except WorkflowError as error:
        return "refused when read", [str(error)]
    json.dumps(found.graph).encode()
    try:
        checked = validate(found.prompt, executor.registry)
    except InvalidPrompt as error:
        json.dumps([error.error, error.node_errors]).encode()
        return "refused when validated", error.sentences()
    result = executor.run(checked, on_event=lambda _, data: json.dumps(data, default=repr).encode())
    if result.error is not None and result.error.traceback:
        raise RuntimeError(f"{result.error.message}: {result.error.traceback[-1]}")
    return result.status, [result.error.message] if result.error else []


def fault(kind: str, sentences: list[str], seconds: float, peak: int, size: int) -> str | None:
    """What is wrong with an outcome, None when it is right."""
    if seconds > PATIENCE:
        return f"took {seconds:.1f} s"
    if peak > 2 * size + SPARE:
        return f"allocated {peak >> 20} MB for {size} bytes"
    if kind != "success" and not sentences:
        return f"{kind} without a sentence"
    for sentence in sentences:
        if "\n" in sentence or len(sentence) > 2500 or sentence != sentence.encode(errors="replace").decode():
            return f"not one short line: {sentence[:300]!r}"
    return None


def test_documents_run_or_are_refused_in_a_sentence(registry: Registry, tmp_path: Path) -> None:
    shipped = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(WORKFLOWS.glob("*.json"))]
    fuzzer = DocumentFuzzer(SEED, shipped[:4])
    executor = Executor(Registry({**registry.classes, **NODES}, {}, registry.folders))
    info = {**Registry.of_pack(registry.folders).object_info(), **executor.registry.object_info(), **INFO}
    path, seen, faults = tmp_path / "w.json", Counter[str](), []
    for number in range(COUNT):
        document = fuzzer.input()
        path.write_bytes(document.data)
        tracemalloc.start()
        start = time.process_time()
        try:
            kind, sentences = outcome(path, document, info, executor)
            wrong = fault(
                kind,
                sentences,
                time.process_time() - start,
                tracemalloc.get_traced_memory()[1],
                len(document.data),
            )
        except Exception as error:
            kind, wrong = "raised", f"{type(error).__name__}: {str(error)[:200]}"
        tracemalloc.stop()
        seen[kind] += 1
        if wrong is not None:
            (tmp_path / f"{number}.bin").write_bytes(document.data)
            faults.append(f"input {number} ({document.settings}): {wrong}")
    assert not faults, f"{len(faults)} of {COUNT} ({dict(seen)}), files in {tmp_path}:\n" + "\n".join(
        faults[:20]
    )
    assert seen["success"] and seen["refused when read"] and seen["refused when validated"], seen
