"""Guidance, reflow, schnell, decide: each against what it must equal, and each learning in little."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer, load_transformer, read_state_dict
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train import distribution_matching as schnell
from rectiflux.flux_core.train import guidance_distillation as guidance
from rectiflux.flux_core.train import loop, reflow
from rectiflux.flux_core.train.flow import predict
from rectiflux.miniature import data, evaluate
from rectiflux.miniature import front_distillation as reading
from rectiflux.miniature import seed_conditioning as decide
from rectiflux.miniature.scene import COLOURS, HELD_OUT_PAIRS, Item, Scene
from rectiflux.miniature.text_encoders import WIDTH, make_encoders

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


def leaning(*towards: float) -> torch.Tensor:
    """Noise [16, 4, 8] whose first channels have this mean, the others none."""
    noise = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(dim=(1, 2), keepdim=True)
    noise[: len(towards)] += torch.tensor(towards)[:, None, None]
    return noise


def test_noise_decides_the_colours_that_a_scene_leaves_open() -> None:
    """By the angle of the means of channels 0 and 1, three colours further for the right or lower object."""
    scene = Scene((Item("star"), Item("heart")), "above")
    found = decide.decided(scene, leaning(1.0, -0.2))
    assert found == Scene((Item("star", "red"), Item("heart", "green")), "above")
    colours = [item.colour for item in decide.decided(scene, leaning(-1.0, -0.3)).items]
    assert colours == ["blue", "red"]
    turned = decide.decided(Scene((Item("heart"), Item("star")), "below"), leaning(-1.0, -0.3))
    assert [item.colour for item in turned.items] == ["red", "blue"]
    alike = decide.decided(Scene((Item("star"),) * 3), leaning(1.0, -0.2))
    assert [item.colour for item in alike.items] == ["red"] * 3
    told = replace(scene, items=(Item("star", "blue"), Item("heart")), background="mint")
    found = decide.decided(told, leaning(1.0, -0.2))
    assert found == replace(told, items=(Item("star", "blue"), Item("heart", "green")))
    assert decide.decided(Scene(), leaning(1.0, 0.0)) == Scene()
    assert decide.full_caption(scene, leaning(1.0, -0.2)) == "a red star above a green heart"


def test_noise_decides_no_colour_that_the_prompt_excludes() -> None:
    """Towards one that is: the nearest other. Combinations held out from training are not excluded."""
    for shape, colour in HELD_OUT_PAIRS:
        place = decide.WHEEL.index(colour)
        turn = 2 * math.pi * place / len(decide.WHEEL) + 0.1
        noise, after = leaning(math.cos(turn), math.sin(turn)), decide.WHEEL[(place + 1) % len(decide.WHEEL)]
        assert decide.decided(Scene((Item(shape),)), noise).items[0].colour == colour
        assert decide.decided(Scene((Item(shape),), without=colour), noise).items[0].colour == after


def test_every_colour_is_as_likely_as_any_other() -> None:
    assert sorted(decide.WHEEL) == sorted(COLOURS)
    noise = torch.randn(3_000, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    scene = Scene((Item("star"), Item("circle")))
    found = [decide.decided(scene, each).items for each in noise]
    for place in (0, 1):
        names = [items[place].colour for items in found]
        assert [names.count(name) / len(names) for name in COLOURS] == pytest.approx([1 / 7] * 7, abs=0.03)


def test_captions_of_the_stage_leave_more_open() -> None:
    """Three in four tell no colour, but of two shapes alike, whose colours alone tell them apart."""
    rng = random.Random(0)
    scenes = [decide.open_caption(rng)[0] for _ in range(2_000)]
    twins = [s for s in scenes if s.kind == "pair" and s.items[0].shape == s.items[1].shape]
    others = [s for s in scenes if s not in twins]
    assert twins and all(item.colour for scene in twins for item in scene.items)
    bare = sum(all(item.colour is None for item in scene.items) for scene in others) / len(others)
    assert bare == pytest.approx(0.75 + 0.25 * 0.15, abs=0.04)  # a seventh told no colour before


def test_the_teacher_is_told_what_the_noise_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption that is kept leaves open what the painted one says."""
    monkeypatch.setattr(reflow, "CHUNK", 4)
    monkeypatch.setattr(reflow, "SHAPES_OF_PICTURES", SIZES)
    way, encoders = evaluate.Sampling(2), make_encoders()
    scene = Scene((Item("star"),))
    reflow.write_pairs(
        tmp_path, teacher(), encoders, 4, 1, way, ask=lambda _: (scene, "a star"), tell=decide.full_caption
    )
    noise, latents, captions = reflow.PairSet(tmp_path).batch(9, random.Random(0))
    assert captions == ["a star"] * 9
    full = encoders.encode([decide.full_caption(scene, each) for each in noise])
    again = evaluate.draw_latents(teacher(), full, encoders.encode([""] * 9), way, noise)
    assert torch.allclose(latents, again, atol=1e-2)
    bare = evaluate.draw_latents(teacher(), encoders.encode(captions), full, way, noise)
    assert not torch.allclose(latents, bare, atol=1e-2)


def test_decide_asks_each_state_for_the_picture_that_its_noise_stands_for() -> None:
    """No loss where the network gives that picture at once; else the distance, square or nearly absolute."""
    noise, _, text = some(2)
    student = teacher()
    x, sigma = schnell.rollout(student, noise, text, 1)
    with torch.no_grad():
        at_once = x - 0.75 * predict(student, x, sigma, text)
    lesson = decide.DecideLesson(student, 0.03)
    assert lesson(x, sigma, at_once, text).item() == pytest.approx(0.0, abs=1e-6)
    assert lesson(x, sigma, at_once + 0.04, text).item() == pytest.approx(0.02, abs=1e-6)  # of 3, 4 and 5


def test_labels_are_what_is_open_alone() -> None:
    """Of red, orange, ...: the left or upper object's colour, the other's; -100 where nothing is open."""
    noise = torch.stack([leaning(1.0, -0.2)] * 6)
    star, heart, blue = Item("star"), Item("heart"), Item("square", "blue")
    scenes = [Scene((star, heart)), Scene((blue, heart)), Scene((star,)), Scene((star,) * 3), Scene((blue,))]
    scenes.append(Scene((heart, star), "right"))
    red, green = list(COLOURS).index("red"), list(COLOURS).index("green")
    found = reading.open_colours(scenes, noise).tolist()
    assert found == [[red, green], [-100, green], [red, -100], [red, -100], [-100, -100], [red, green]]


def test_a_tutor_of_a_student_that_is_its_teacher_asks_for_the_colours_alone() -> None:
    """Told the same, both have the same tokens; readers that say nothing then have lost ln 7. Else more."""
    noise, _, text = some(2)
    other = Conditioning(text.txt + 1, text.pooled - 1)
    tutor = reading.Tutor(teacher(), teacher())
    for reader in tutor.readers:
        torch.nn.init.zeros_(reader[1].weight)
        torch.nn.init.zeros_(reader[1].bias)
    labels = torch.tensor([[3, -100], [0, 6]])
    same, apart = tutor(noise, text, text, labels), tutor(noise, text, other, labels)
    assert same.item() == pytest.approx(math.log(7), abs=1e-5) and apart.item() > same.item() + 1e-3
    apart.backward()
    assert all(parameter.grad is None for parameter in tutor.teacher.parameters())
    fronts = [tutor.student.double_blocks, tutor.student.single_blocks]
    assert all(parameter.grad is not None for front in fronts for parameter in front.parameters())


def test_a_tutor_teaches_to_read() -> None:
    """One batch learned by heart: the loss of eight noises and their colours falls by a quarter."""
    torch.manual_seed(1)
    noise, _, text = some(8)
    labels = torch.randint(7, (8, 2))
    tutor = reading.Tutor(teacher(), teacher())
    optimizers = loop.make_optimizers(tutor, 2e-3)
    first = tutor(noise, text, text, labels).item()
    for _ in range(40):
        loop.descend(tutor(noise, text, text, labels), tutor, optimizers)
    last = tutor(noise, text, text, labels).item()
    assert last < 0.75 * first, (first, last)


@pytest.mark.slow
def test_each_stage_learns(
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    new_autoencoder: Callable[[], AutoEncoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 60 small steps guidance lowers its loss by a third, reflow by a quarter, decide by a tenth.

    schnell and reading write a model.
    """
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
    own, settled = tmp_path / "own", tmp_path / "decided.safetensors"
    way, asked = evaluate.FAMILY["schnell"], {"ask": decide.open_caption, "tell": decide.full_caption}
    reflow.write_pairs(own, flow_student, encoders, 8, 1, way, batch=4, **asked)
    capsys.readouterr()
    for steps in (1, 60):
        decide.train_decide(settled, own, encoders, flow_student, steps, recipe=decide.DecideRecipe(**common))
    first, *_, last = losses()
    assert last < 0.9 * first, (first, last)
    monkeypatch.setattr(reading, "SHAPES_OF_PICTURES", SIZES)
    read, reader = tmp_path / "reading.safetensors", reading.ReadRecipe(**common)
    reading.train_reading(read, encoders, flow_student, 2, recipe=reader)
    assert load_transformer(read).spec == TINY
