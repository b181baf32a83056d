"""`run.py train`: every stage in a row, in little, to files that load; and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.flux_core import load_autoencoder, load_text_encoders, load_transformer, preview
from rectiflux.flux_core.train import cli
from rectiflux.flux_core.train.flow import MINI
from rectiflux.flux_core.train.scenes import ATTRIBUTES
from rectiflux.flux_core.weights import read_metadata


def test_an_unknown_stage_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["flwo"])
    assert ended.value.code == 2
    assert "there is no stage 'flwo'; choose among text, latents, flow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "earlier"), [("flow", "text"), ("decoder", "latents"), ("evaluate", "text"), ("export", "text")]
)
def test_a_stage_without_the_one_before_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, earlier: str
) -> None:
    assert cli.main([stage, "--dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"stage {stage}" and len(said) == 2
    assert said[1].startswith(f"the stage {stage} could not run: {tmp_path}")
    assert said[1].endswith(f"does not exist; run the stage {earlier} first")


@pytest.mark.slow
def test_all_stages_in_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of everything: files of the miniature's sizes, in half precision, with their metadata."""
    steps = ["--text-steps", "2", "--flow-steps", "2", "--decoder-steps", "1", "--pictures", "64"]
    places = ["--dir", str(tmp_path / "work"), "--models", str(tmp_path / "models")]
    assert cli.main([*steps, *places, "--batch", "2", "--count", "8"]) == 0
    models = tmp_path / "models"
    transformer = load_transformer(models / "diffusion_models" / "rectiflux-mini.safetensors")
    assert transformer.spec == MINI and transformer.dtype == torch.float16
    metadata = read_metadata(models / "diffusion_models" / "rectiflux-mini.safetensors")
    assert metadata["samples"] == "4" and preview.from_metadata(metadata) is not None
    text = models / "text_encoders"
    load_text_encoders(text / "rectiflux-mini-clip.safetensors", text / "rectiflux-mini-t5.safetensors")
    load_autoencoder(models / "vae" / "rectiflux-mini-vae.safetensors")
    scores = json.loads((tmp_path / "work" / "scores.json").read_text(encoding="utf-8"))
    assert scores["full"].keys() == {"strict", *ATTRIBUTES}
    assert scores["short"].keys() == {"strict", "shape", "colour"}
    with Image.open(tmp_path / "work" / "scores.png") as sheet:
        assert sheet.size == (8 * 128, 128)
    assert "strict" in capsys.readouterr().out
