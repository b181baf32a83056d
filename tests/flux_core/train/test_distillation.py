"""Guidance, reflow and schnell: each against what it must equal, and each learning something in little."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer, load_transformer, read_state_dict
from rectiflux.flux_core.spec import Conditioning
from rectiflux.flux_core.train import data, evaluate, guidance, reflow, schnell
from rectiflux.flux_core.train.flow import predict
from rectiflux.flux_core.train.text import WIDTH, make_encoders
from rectiflux.flux_core.vae import AutoEncoder

TINY = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=1, context_in=WIDTH, vec_in=WIDTH)
SIZES = ((64, 32, 1.0),)


def teacher() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer(TINY)


def some(batch: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    torch.manual_seed(2)
    text = Conditioning(torch.randn(batch, 5, WIDTH), torch.randn(batch, WIDTH))
    return torch.randn(batch, 16, 4, 8), torch.rand(batch), text


def test_the_guided_teacher_is_two_passes() -> None:
    noisy, sigmas, text = some(3)
    empty, scales = some(3)[2], torch.tensor([1.0, 3.0, 0.0])
    empty = Conditioning(empty.txt + 1, empty.pooled - 1)
    with torch.no_grad():
        found = guidance.guided_teacher(teacher(), noisy, sigmas, text, empty, scales)
        with_prompt = predict(teacher(), noisy, sigmas, text)
        without = predict(teacher(), noisy, sigmas, empty)
    expected = without + scales[:, None, None, None] * (with_prompt - without)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_new_student_of_guidance_is_its_teacher_at_every_scale() -> None:
    noisy, sigmas, text = some(2)
    student = guidance.with_guidance(teacher())
    assert student.spec == replace(TINY, guidance_embed=True)
    with torch.no_grad():
        for scale in (1.0, 4.0):
            found = predict(student, noisy, sigmas, text, torch.full((2,), scale))
            assert torch.allclose(found, predict(teacher(), noisy, sigmas, text), atol=1e-6)


def test_a_distilled_teacher_of_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="must be undistilled, this one has a guidance embedder"):
        guidance.with_guidance(FluxTransformer(replace(TINY, guidance_embed=True)))


def test_folded_guidance_is_the_guidance_it_folds() -> None:
    noisy, sigmas, text = some(2)
    torch.manual_seed(5)
    dev = FluxTransformer(replace(TINY, guidance_embed=True))
    folded = reflow.fold_guidance(dev, 3.0)
    assert folded.guidance_in is None
    with torch.no_grad():
        expected = predict(dev, noisy, sigmas, text, torch.full((2,), 3.0))
        other = predict(dev, noisy, sigmas, text, torch.full((2,), 1.0))
        found = predict(folded, noisy, sigmas, text)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, other, atol=1e-3)


def test_sigmas_rise_to_both_ends_and_a_tenth_are_one() -> None:
    """The arcsine law has a quarter of its mass below sin^2(pi/8) = 0.1464 and its median at 1/2."""
    torch.manual_seed(0)
    sigmas = reflow.end_heavy_sigmas(100_000)
    assert (sigmas == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    inner = sigmas[sigmas < 1]
    quartiles = inner.quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.1464, 0.5, 0.8536], abs=0.01)


def test_pseudo_huber_is_its_formula() -> None:
    """sqrt(e^2 + c^2) - c of root mean square errors 0 and 3 with c = 4: (0 + 1) / 2."""
    error = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 3.0)])
    assert reflow.pseudo_huber(error, 4.0).item() == pytest.approx(0.5, rel=1e-6)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of pairs by a teacher in two steps, of pictures of 64 x 32."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reflow, "CHUNK", 8)
        patched.setattr(reflow, "SHAPES_OF_PICTURES", SIZES)
        reflow.write_pairs(folder, teacher(), make_encoders(), 8, 1, evaluate.Sampling(2), batch=4)
    return folder


def test_pairs_lie_at_both_ends_of_the_teachers_path(pairs: Path) -> None:
    """The first four made again: float16 of what sampling gives for their captions."""
    noise, latents, captions = reflow.PairSet(pairs).batch(50, random.Random(0))
    assert noise.shape == latents.shape == (50, 16, 4, 8) and len(captions) == 50
    file = read_state_dict(pairs / "00000.safetensors")
    encoders = make_encoders()
    texts = [bytes(row).rstrip(b"\0").decode() for row in file["captions"][:4].tolist()]
    text, empty = encoders.encode(texts), encoders.encode([""] * 4)
    drawn = reflow.draw_noise(1 * 1_000_003, 8, 4, 8)[:4]
    again = evaluate.draw_latents(teacher(), text, empty, evaluate.Sampling(2), drawn)
    assert torch.equal(file["noise"][:4], drawn.half())
    assert torch.allclose(file["latents"][:4].float(), again, atol=5e-3)


def test_existing_pairs_are_kept(pairs: Path) -> None:
    before = (pairs / "00000.safetensors").stat().st_mtime_ns
    reflow.write_pairs(pairs, teacher(), make_encoders(), 8, 1, evaluate.Sampling(2), batch=4)
    assert (pairs / "00000.safetensors").stat().st_mtime_ns == before


def test_a_folder_without_pairs_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pairs; run the stage pairs first"):
        reflow.PairSet(tmp_path)


def test_a_rollout_is_schnells_own_steps() -> None:
    """After 2 of 4 steps: sigma 1/2, and the state of two Euler steps of 1/4."""
    noise, _, text = some(2)
    student = teacher()
    state, sigma = schnell.rollout(student, noise, text, 2)
    with torch.no_grad():
        x = noise - 0.25 * predict(student, noise, torch.ones(2), text)
        x = x - 0.25 * predict(student, x, torch.full((2,), 0.75), text)
    assert torch.allclose(state, x, atol=1e-5) and sigma.tolist() == [0.5, 0.5]


def test_matching_pulls_nowhere_when_critic_and_teacher_agree_and_from_critic_to_teacher_else() -> None:
    noisy, _, text = some(2)
    start, sigmas, fresh = torch.ones(2), torch.full((2,), 0.5), torch.randn(2, 16, 4, 8)
    same = schnell.Matching(teacher(), teacher(), teacher())
    loss, _ = same.student_loss(noisy, start, fresh, sigmas, text)
    assert loss.item() == pytest.approx(0.0, abs=1e-8)
    torch.manual_seed(9)
    other = FluxTransformer(TINY)
    matching = schnell.Matching(teacher(), teacher(), other)
    _, denoised = matching.student_loss(noisy, start, fresh, sigmas, text)
    denoised.retain_grad()
    again = 0.5 * denoised.detach() + 0.5 * fresh
    with torch.no_grad():
        real = again - 0.5 * predict(other, again, sigmas, text)
        fake = again - 0.5 * predict(teacher(), again, sigmas, text)
        distance = (denoised - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    loss, denoised = matching.student_loss(noisy, start, fresh, sigmas, text)
    (gradient,) = torch.autograd.grad(loss, denoised)
    assert torch.allclose(gradient * denoised.numel(), (fake - real) / distance, atol=1e-3)


@pytest.mark.slow
def test_each_stage_learns(
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    new_autoencoder: Callable[[], AutoEncoder],
) -> None:
    """Guidance lowers its loss by a third, reflow by a quarter in 60 small steps; schnell writes a model."""
    latents = tmp_path / "latents.safetensors"
    data.write_latents(latents, new_autoencoder(), 16, workers=1, sizes=SIZES)
    encoders = make_encoders()
    common = {"batch": 8, "warmup": 2, "compiled": False}

    def losses() -> list[float]:
        said = capsys.readouterr().err
        return [float(line.split("loss ")[1].split(",")[0]) for line in said.splitlines() if "loss " in line]

    dev = tmp_path / "dev.safetensors"
    for steps in (1, 60):
        recipe = guidance.GuidanceRecipe(**common)
        guidance.train_guidance(dev, latents, encoders, teacher(), steps, recipe=recipe)
    first, *_, last = losses()
    assert last < 0.67 * first
    student = tmp_path / "reflow.safetensors"
    for steps in (1, 60):
        recipe = reflow.ReflowRecipe(**common)
        reflow.train_reflow(student, pairs, encoders, teacher(), steps, recipe=recipe)
    first, *_, last = losses()
    assert last < 0.75 * first
    out = tmp_path / "schnell.safetensors"
    flow_student = load_transformer(student, dtype=torch.float32)
    dev_teacher = load_transformer(dev, dtype=torch.float32)
    for network in (flow_student, dev_teacher):
        network.requires_grad_(True)
    recipe = schnell.SchnellRecipe(**common)
    schnell.train_schnell(out, pairs, encoders, flow_student, dev_teacher, 2, recipe=recipe)
    assert load_transformer(out).spec == TINY
