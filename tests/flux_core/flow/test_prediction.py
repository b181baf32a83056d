"""Conversions between predictions, against what autograd of the log density says, on every path and pair."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.flow import (
    KINDS,
    ChainPath,
    CosinePath,
    GaussianMixture,
    LinearBetaPath,
    Path,
    RectifiedPath,
    as_velocity,
    convert,
)
from torch import Tensor

from .closed_form import ALL

PAIRS = [(of, to) for of in KINDS for to in KINDS]

GENERATOR = torch.Generator().manual_seed(0)
ROOTS = torch.randn(3, 2, 2, generator=GENERATOR, dtype=torch.float64)
SQUARES = ROOTS @ ROOTS.mT + 0.3 * torch.eye(2, dtype=torch.float64)
MIXTURE = GaussianMixture(
    torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    2 * torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64),
    (SQUARES + SQUARES.mT) / 2,
)
POINTS = 2 * torch.randn(64, 2, generator=GENERATOR, dtype=torch.float64)


def truth(path: Path, t: float) -> dict[str, Tensor]:
    """All four predictions from autograd of log p_t alone: Tweedie's formula, and the SDE's f and g."""
    x = POINTS.clone().requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.marginal(path, t).log_prob(x).sum(), x)
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    return {
        "score": score,
        "noise": -sigma * score,
        "data": (POINTS + sigma**2 * score) / alpha,
        "velocity": path.drift(time) * POINTS - path.diffusion(time) ** 2 / 2 * score,
    }


@ALL
@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_conversions_agree_with_autograd_of_the_log_density(path: Path, of: str, to: str) -> None:
    for t in (0.02, 0.3, 0.7, 0.98):
        known = truth(path, t)
        for given in (known[of], MIXTURE.predict(path, of, POINTS, t)):
            got = convert(path, given, of, to, POINTS, t)
            torch.testing.assert_close(got, known[to], rtol=1e-10, atol=1e-10)


@ALL
@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_conversions_are_undone_by_their_inverses(path: Path, of: str, to: str) -> None:
    """For any values, whether or not they are predictions of anything; one time per sample, any shape."""
    value, x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    there = convert(path, value, of, to, x, t)
    assert there.shape == x.shape
    torch.testing.assert_close(convert(path, there, to, of, x, t), value, rtol=1e-10, atol=1e-10)
    alone = convert(path, value[2:3], of, to, x[2:3], 0.5)
    torch.testing.assert_close(there[2:3], alone, rtol=1e-12, atol=1e-12)


def test_the_rectified_path_by_hand() -> None:
    """data = x - t v, noise = x + (1 - t) v, score = -(x + (1 - t) v)/t: at t 1/4, x 3, v 2."""
    x, v = torch.tensor([3.0]), torch.tensor([2.0])
    expected = {"data": 2.5, "noise": 4.5, "score": -18.0, "velocity": 2.0}
    for to, value in expected.items():
        assert convert(RectifiedPath(), v, "velocity", to, x, 0.25).item() == value
        assert convert(RectifiedPath(), torch.tensor([value]), to, "velocity", x, 0.25).item() == 2.0


def test_the_score_of_ddpm_has_alpha_bar() -> None:
    """-noise / sqrt(1 - alpha_bar_i), not alpha_i = 1 - beta_i: betas 0.36 and 0.75 give alpha_bar 0.16."""
    chain = ChainPath(torch.tensor([0.36, 0.75]))
    score = convert(chain, torch.ones(1).double(), "noise", "score", torch.zeros(1).double(), 1.0)
    assert score.item() == pytest.approx(-1 / (1 - 0.64 * 0.25) ** 0.5, rel=1e-7)


def test_a_rectified_velocity_determines_data_and_noise_at_both_ends() -> None:
    path, x, v = RectifiedPath(), torch.tensor([3.0]), torch.tensor([2.0])
    assert convert(path, v, "velocity", "data", x, 0.0).item() == 3.0
    assert convert(path, v, "velocity", "noise", x, 0.0).item() == 5.0
    assert convert(path, v, "velocity", "data", x, 1.0).item() == 1.0
    assert convert(path, v, "velocity", "noise", x, 1.0).item() == 3.0
    assert convert(path, v, "velocity", "score", x, 1.0).item() == -3.0


@pytest.mark.parametrize("path", [RectifiedPath(), CosinePath()], ids=["rectified", "cosine"])
@pytest.mark.parametrize(
    ("of", "to", "t", "where"),
    [
        ("data", "noise", 0.0, "t = 0, where sigma is 0"),
        ("data", "score", 0.0, "t = 0, where sigma is 0"),
        ("noise", "score", 0.0, "t = 0, where sigma is 0"),
        ("noise", "data", torch.tensor([0.5, 1.0]), "t = 1, where alpha is 0"),
        ("score", "data", torch.tensor([0.5, 1.0]), "t = 1, where alpha is 0"),
        ("noise", "velocity", 1.0, "t = 1"),
        ("score", "velocity", 1.0, "t = 1"),
    ],
)
def test_what_the_ends_do_not_determine_is_refused(
    path: Path, of: str, to: str, t: float | Tensor, where: str
) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"the {of} doesn't determine the {to} at {where}"):
        convert(path, x, of, to, x, t)


def test_wrong_input_is_refused() -> None:
    x = torch.ones(2, 3)
    for of, to in (("epsilon", "data"), ("data", "epsilon")):
        with pytest.raises(ValueError, match="epsilon"):
            convert(RectifiedPath(), x, of, to, x, 0.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        convert(RectifiedPath(), x, "data", "data", x, 1.5)
    with pytest.raises(ValueError, match="LinearBetaPath has no finite velocity at t = 0"):
        convert(LinearBetaPath(), x, "velocity", "noise", x, 0.0)


def test_a_network_as_a_velocity_gets_one_time_per_sample() -> None:
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return MIXTURE.predict(LinearBetaPath(), "noise", x, t)

    velocity = as_velocity(LinearBetaPath(), network, "noise")(POINTS, 0.3)
    torch.testing.assert_close(velocity, truth(LinearBetaPath(), 0.3)["velocity"], rtol=1e-10, atol=1e-10)
    assert torch.equal(times[0], torch.full((64,), 0.3, dtype=torch.float64))
