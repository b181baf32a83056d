"""`run.py train`: all stages in a row on little data, to files that load; and messages for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.flux_core import load_autoencoder, load_text_encoders, load_transformer
from rectiflux.flux_core.sampling import preview
from rectiflux.flux_core.weights import read_metadata
from rectiflux.miniature import cli
from rectiflux.miniature.base import MINI


def test_an_unknown_stage_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bsae"])
    assert ended.value.code == 2
    assert "there is no stage 'bsae'; choose among text, data, base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "earlier"), [("base", "text"), ("autoencoder", "data"), ("export", "text")]
)
def test_a_stage_without_earlier_ones_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, earlier: str
) -> None:
    assert cli.main([stage, "--dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"stage {stage}" and len(said) == 2
    assert said[1].startswith(f"the stage {stage} could not run: {tmp_path}")
    assert said[1].endswith(f"does not exist; run the stage {earlier} first")


@pytest.mark.slow
def test_all_stages_in_little(tmp_path: Path) -> None:
    """A step or two of everything: a pro, a dev and a schnell in half precision, with their metadata."""
    steps = [f"--{stage}-steps=1" for stage in cli.STEPS]
    places = ["--dir", str(tmp_path / "work"), "--models", str(tmp_path / "models")]
    amounts = ["--pictures", "40", "--pairs", "1", "--batch", "2"]
    assert cli.main([*steps, *amounts, *places, *cli.RUN]) == 0
    models = tmp_path / "models"
    titles = {name: f"mini-{name}" for name in ("pro", "dev", "kontext", "canny", "fill", "schnell")} | {
        "reflow": "mini-pro, reflowed"
    }
    for name, title in titles.items():
        path = models / "diffusion_models" / f"rectiflux-mini-{name}.safetensors"
        transformer = load_transformer(path)
        assert transformer.dtype == torch.float16 and transformer.spec.hidden_size == MINI.hidden_size
        assert transformer.spec.guidance_embed == (name in ("dev", "kontext", "canny", "fill"))
        assert transformer.spec.in_channels == {"canny": 128, "fill": 384}.get(name, 64)
        metadata = read_metadata(path)
        assert metadata["samples"] == "2" and preview.from_metadata(metadata) is not None
        assert metadata["modelspec.title"] == f"Rectiflux {title}"
    text = models / "text_encoders"
    load_text_encoders(text / "rectiflux-mini-clip.safetensors", text / "rectiflux-mini-t5.safetensors")
    load_autoencoder(models / "vae" / "rectiflux-mini-vae.safetensors")
    for stage in ("base", "guidance", "reflow", "schnell", "decide"):
        with Image.open(tmp_path / "work" / f"{stage}.png") as sheet:
            assert sheet.size == (4 * 128, 2 * 128)
