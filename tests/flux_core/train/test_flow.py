"""The rectified-flow training: its data, noise levels, loss and schedule, and that it resumes and learns."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer, load_transformer, pack, read_state_dict
from rectiflux.flux_core.spec import Conditioning
from rectiflux.flux_core.train import flow
from rectiflux.flux_core.train.autoencoder import new_autoencoder, to_tensor
from rectiflux.flux_core.train.pca import encode_fast, linear_code
from rectiflux.flux_core.train.scenes import ATTRIBUTES, Scene, draw
from rectiflux.flux_core.train.text import make_encoders
from rectiflux.flux_core.vae import to_model_space

TINY = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=1, context_in=128, vec_in=128)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    flow.write_latents(path, new_autoencoder(), 40, seed=3, width=64, height=32, workers=1)
    return path


def test_latents_are_of_the_scenes_that_they_name(latents: Path) -> None:
    """The first one drawn and encoded again, from its seed."""
    data = flow.LatentSet(latents)
    assert data.latents.shape == (40, 16, 4, 8) and data.latents.dtype == torch.float16
    rng = random.Random(3 * 1_000_003)
    scenes = [Scene.random(rng) for _ in range(40)]
    named = [
        Scene(**{k: v[i] for (k, v), i in zip(ATTRIBUTES.items(), row, strict=True)})
        for row in data.attributes
    ]
    assert named == scenes
    picture = to_tensor(draw(scenes[0], rng, 64, 32)[None])
    expected = to_model_space(encode_fast(picture, linear_code(new_autoencoder())))[0]
    assert (data.latents[0].float() - expected).abs().max() < 5e-3


def test_workers_do_not_change_the_latents(latents: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    flow.write_latents(path, new_autoencoder(), 40, seed=3, width=64, height=32, workers=2)
    assert torch.equal(read_state_dict(path)["latents"], flow.LatentSet(latents).latents)


def test_captions_fit_their_latents_and_some_are_empty(latents: Path) -> None:
    data = flow.LatentSet(latents)
    images, captions = data.batch(400, random.Random(0), empty_share=0.25)
    assert images.shape == (400, 16, 4, 8)
    assert sum(not caption for caption in captions) / 400 == pytest.approx(0.25, abs=0.07)
    for image, caption in zip(images, captions, strict=True):
        row = int((data.latents.float() - image).abs().sum(dim=(1, 2, 3)).argmin())
        told = [values[i] for values, i in zip(ATTRIBUTES.values(), data.attributes[row], strict=True)]
        assert not caption or (told[0] in caption and told[1] in caption)


def test_another_file_is_no_file_of_latents(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=r"x\.safetensors is no file of latents; run the stage 'latents'"):
        flow.LatentSet(tmp_path / "x.safetensors")


def test_sigmas_are_logit_normal_with_a_uniform_share() -> None:
    """Quartiles of the logits, mean +- 0.6745 std, without the uniform share; the ends only with it."""
    torch.manual_seed(0)
    sigmas = flow.draw_sigmas(100_000, flow.Recipe(sigma_mean=0.7, sigma_std=1.2, uniform_share=0.0))
    quartiles = torch.logit(sigmas).quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.7 - 0.6745 * 1.2, 0.7, 0.7 + 0.6745 * 1.2], abs=0.02)
    uniform = flow.draw_sigmas(100_000, flow.Recipe(uniform_share=1.0))
    assert uniform.histc(10, 0, 1).tolist() == pytest.approx([10_000] * 10, rel=0.05)


def test_the_loss_of_a_fresh_model_is_that_of_no_velocity() -> None:
    """adaLN-zero: the first velocity is zero, so the loss is the mean of (noise - image)^2."""
    torch.manual_seed(0)
    model = FluxTransformer(TINY)
    flow.initialise(model)
    images, noise = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    text = Conditioning(torch.randn(3, 5, 128), torch.randn(3, 128))
    loss = flow.velocity_loss(model, images, noise, torch.tensor([0.1, 0.5, 0.9]), text)
    assert loss.item() == pytest.approx((noise - images).square().mean().item(), rel=1e-5)


def test_the_loss_is_the_velocitys_error_at_the_right_point() -> None:
    """Against sampling's own way: prepare and forward, each picture alone, at (1 - s) image + s noise."""
    torch.manual_seed(1)
    model = FluxTransformer(TINY)
    images, noise = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    text = Conditioning(torch.randn(2, 5, 128), torch.randn(2, 128))
    sigmas = [0.25, 0.75]
    expected = []
    with torch.no_grad():
        for i, sigma in enumerate(sigmas):
            one = Conditioning(text.txt[i : i + 1], text.pooled[i : i + 1])
            tokens = pack((1 - sigma) * images[i : i + 1] + sigma * noise[i : i + 1])
            velocity = model(tokens, model.prepare(one, [sigma], 4, 6), sigma)
            expected.append((velocity - pack(noise[i : i + 1] - images[i : i + 1])).square().mean())
    loss = flow.velocity_loss(model, images, noise, torch.tensor(sigmas), text)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_every_parameter_is_trained_by_one_optimizer() -> None:
    model = FluxTransformer(TINY)
    muon, adam = flow.make_optimizers(model, 1e-3)
    groups = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adam)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    matrices = {id(block.linear1.weight) for block in model.single_blocks}
    assert matrices <= groups[0] and id(model.img_in.weight) in groups[1]


def test_the_rate_warms_up_stays_and_descends() -> None:
    recipe = flow.Recipe(warmup=10, decay_share=0.25)
    rates = [flow.rate(step, 100, recipe) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:76] == [1.0] * 67
    assert rates[76:101] == pytest.approx([(100 - step) / 25 for step in range(76, 101)])


def train(out: Path, latents: Path, steps: int, **settings: object) -> dict[str, torch.Tensor]:
    encoders = make_encoders()
    recipe = flow.Recipe(batch=4, warmup=2)
    flow.train_flow(
        out, latents, encoders, steps, recipe=recipe, spec=TINY, save_every=3, compiled=False, **settings
    )
    return {name: value.clone() for name, value in read_state_dict(out).items()}


def test_a_killed_training_resumes_as_if_unbroken(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed in step 5 of 8, after the checkpoint of step 3; the weights are the same, bit for bit."""
    unbroken = train(tmp_path / "a.safetensors", latents, 8)
    calls, check = [0], flow.refuse_nan

    def killed(loss: torch.Tensor, step: int) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        check(loss, step)

    monkeypatch.setattr(flow, "refuse_nan", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b.safetensors", latents, 8)
    resumed = train(tmp_path / "b.safetensors", latents, 8)
    assert calls[0] == 5 + 5  # steps 4 to 8 again
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_what_it_writes_is_a_model(latents: Path, tmp_path: Path) -> None:
    train(tmp_path / "a.safetensors", latents, 2, bf16=True)
    model = load_transformer(tmp_path / "a.safetensors")
    assert model.spec == TINY and model.dtype == torch.float32


@pytest.mark.slow
def test_it_learns(latents: Path, tmp_path: Path) -> None:
    """The loss of the same noise falls by more than a quarter of a fresh model's within 120 small steps."""
    train(tmp_path / "a.safetensors", latents, 120)
    model = load_transformer(tmp_path / "a.safetensors")
    data = flow.LatentSet(latents)
    images, captions = data.batch(40, random.Random(9), 0.0)
    torch.manual_seed(9)
    noise, sigmas = torch.randn_like(images), torch.full((40,), 0.5)
    with torch.no_grad():
        loss = flow.velocity_loss(model, images, noise, sigmas, make_encoders().encode(captions)).item()
    assert math.isfinite(loss)
    assert loss < 0.75 * (noise - images).square().mean().item()
