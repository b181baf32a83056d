"""What other nodes attach to a FLUX model has the same effect on ours as on ComfyUI's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import DEV, inside

AGREE = 80.0
"""dB between the latents of the two networks."""


@pytest.fixture(scope="module")
def found(base: Path) -> dict[str, Any]:
    found = inside("inside_patches.py", base / "models" / "diffusion_models" / DEV)
    print("| what | effect on ComfyUI's FLUX, dB | ours to it, dB |\n|-|-|-|")
    for name, values in found.items():
        if name != "refused" and isinstance(values[0], float):
            print(f"| {name} | {values[0]:.1f} | {values[1]:.1f} |")
    return found


@pytest.mark.parametrize(
    "case",
    [
        "NAGuidance",
        "ScaleROPE",
        "USOStyleReference",
        "attention patches",
        "replaced blocks",
        "attention override",
        "references, None",
        "references, offset",
        "references, index",
        "references, uxo",
        "attention mask",
        "FluxDisableGuidance",
        "no pooled vector",
    ],
)
def test_patches_and_conditions(found: dict[str, Any], case: str) -> None:
    effect, agreement = found[case]
    assert effect < 60, "it changes the latent, so that ignoring it would show"
    assert agreement >= AGREE


@pytest.mark.parametrize("case", ["plain", "136x120", "120x136", "128x120", "control"])
def test_plain_calls_odd_latents_and_control_residuals(found: dict[str, Any], case: str) -> None:
    assert found[case][1] >= AGREE


@pytest.mark.parametrize("case", ["HyperTile", "TomePatchModel"])
def test_patches_for_unets_are_refused_as_they_fail_on_comfyuis(found: dict[str, Any], case: str) -> None:
    theirs, ours = found["refused"][case]
    assert "Error" in theirs and ours.startswith("ValueError") and "FLUX" in ours


@pytest.mark.parametrize("case", ["index_timestep_zero", "FluxKVCache"])
def test_references_at_timestep_zero_work_where_comfyuis_own_flux_fails(
    found: dict[str, Any], case: str
) -> None:
    """They are near the references at the step's own timestep, and not the same."""
    theirs, ours = found[case]
    assert "Error" in theirs and 5 < ours < 60
