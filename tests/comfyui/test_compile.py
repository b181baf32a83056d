"""ComfyUI's node TorchCompileModel, which compiles a model with torch's inductor, on our MODEL."""

from __future__ import annotations

from pathlib import Path

from .conftest import DEV, inside


def test_a_compiled_model_gives_the_same_latent(base: Path) -> None:
    found = inside("inside_compile.py", base / "models" / "diffusion_models" / DEV)
    assert found["error"] == "" and found["compiled"] > 0
    assert found["agreement"] >= 80.0
    assert found["plain model afterwards"] == 200.0, "the model that was compiled is another"
