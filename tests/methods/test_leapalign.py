"""LeapAlign's draws, plan and loss against the paper's formulas, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from leapalign.inputs.validation import UserError
from leapalign.methods import get_method
from leapalign.rollout import Rollout

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draws_are_ordered_distinct_and_uniform_over_all_pairs() -> None:
    steps, count = 5, 20_000
    drawn = get_method("leapalign").draw(steps, count, generator())
    k, j = drawn["k"], drawn["j"]
    assert k.shape == j.shape == (count,)
    assert k.dtype == j.dtype == torch.int64
    assert bool((k < j).all())
    pairs = torch.bincount(k * steps + j, minlength=steps * steps).view(steps, steps)
    seen = pairs[pairs > 0]
    assert len(seen) == 10, "every pair k < j"
    # 10 equally likely pairs: each count is within 5 standard deviations of the mean.
    assert bool(((seen - count / 10).abs() < 5 * (count * 0.1 * 0.9) ** 0.5).all())


def test_same_seed_same_draw() -> None:
    method = get_method("leapalign")
    first, second = (method.draw(25, 8, generator(4)) for _ in range(2))
    assert torch.equal(first["k"], second["k"])
    assert torch.equal(first["j"], second["j"])


def test_plan_by_hand() -> None:
    plan = get_method("leapalign", alpha=0.3).plan(SIGMAS, k=torch.tensor([0, 1]), j=torch.tensor([2, 3]))
    assert plan.index.tolist() == [[0, 1], [2, 3]]
    assert plan.coefficient.tolist() == [[-0.5, -0.5], [-0.5, -0.25]]
    assert plan.coefficient.dtype == plan.discount.dtype == torch.float32
    torch.testing.assert_close(plan.discount, torch.tensor([0.0, 0.3]))


def test_loss_by_hand() -> None:
    """Two samples, k = 0, j = 2: distances, weights and the hinge, computed in the comments."""
    latents = torch.zeros(5, 2, 2)
    velocities = torch.zeros(4, 2, 2)
    latents[0] = 1.0
    velocities[0] = 2.0  # leap to j: 1 - (1 - 0.5) * 2 = 0
    latents[2, 0], latents[2, 1] = 0.3, -0.02  # d_j = 0.3 and 0.02
    velocities[2] = 1.0  # leap to the end: x_j - 0.5
    latents[4, 0], latents[4, 1] = 0.3, -0.52 + 0.05  # d_end = 0.5 and 0.05
    rollout = Rollout(latents, velocities, SIGMAS)
    reward = torch.tensor([0.2, 0.9], requires_grad=True)
    indices = {"k": torch.tensor([0, 0]), "j": torch.tensor([2, 2])}
    loss, seen = get_method("leapalign", tau=0.1).loss(reward, 0.5, rollout, **indices)
    torch.testing.assert_close(seen["d_j"], torch.tensor([0.3, 0.02]))
    torch.testing.assert_close(seen["d_end"], torch.tensor([0.5, 0.05]))
    # w = 1 / (max(0.3, 0.1) + max(0.5, 0.1)) and 1 / (0.1 + 0.1)
    torch.testing.assert_close(seen["w"], torch.tensor([1.25, 5.0]))
    # mean(1.25 * (0.5 - 0.2), 5 * 0): the second image is above the threshold
    torch.testing.assert_close(loss, torch.tensor(1.25 * 0.3 / 2))
    (gradient,) = torch.autograd.grad(loss, reward)
    torch.testing.assert_close(gradient, torch.tensor([-1.25 / 2, 0.0]))


def world_of_three_leaps() -> tuple[Rollout, dict[str, torch.Tensor], list[float]]:
    """Two samples alike, starts 0, 1 and 3, and the distances 0.2, 0.4 and 0.8 from each leap to its target."""
    latents, velocities = torch.zeros(5, 2, 3), torch.zeros(4, 2, 3)
    latents[1], latents[3], latents[4] = 0.2, 0.6, 1.4
    starts = {"k": torch.tensor([0, 0]), "j": torch.tensor([1, 1]), "m": torch.tensor([3, 3])}
    return Rollout(latents, velocities, SIGMAS), starts, [0.2, 0.4, 0.8]


@pytest.mark.parametrize(
    ("weigh_by", "weight"),
    [("all", 1 / 1.4), ("connectors", 1 / 0.6), ("end", 1 / 0.8), ("none", 1.0)],
)
def test_weights_of_three_leaps(weigh_by: str, weight: float) -> None:
    rollout, starts, expected = world_of_three_leaps()
    method = get_method("leapalign", leaps=3, weigh_by=weigh_by)
    loss, seen = method.loss(torch.tensor([0.1, 0.4]), 0.5, rollout, **starts)
    torch.testing.assert_close(loss, torch.tensor(weight * (0.4 + 0.1) / 2))
    for name, distance in zip(("d_j", "d_m", "d_end"), expected, strict=True):
        torch.testing.assert_close(seen[name], torch.full((2,), distance))
    assert ("w" in seen) == (weigh_by != "none")


def test_one_leap_is_weighed_by_its_end() -> None:
    rollout, _, _ = world_of_three_leaps()
    _, seen = get_method("leapalign", leaps=1).loss(torch.zeros(2), 0.5, rollout, k=torch.tensor([1, 3]))
    torch.testing.assert_close(seen["d_end"], torch.tensor([1.2, 0.8]))
    torch.testing.assert_close(seen["w"], 1 / torch.tensor([1.2, 0.8]))


def test_lagrange_distances_are_those_of_its_own_leaps() -> None:
    """Velocities quadratic in sigma: three supports integrate them exactly, so the leap lands on the exact solution."""
    sigmas = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.0], dtype=torch.float64)
    velocities = (3 * sigmas[:-1] ** 2 - 1).view(-1, 1, 1).expand(-1, 1, 2)
    latents = (sigmas**3 - sigmas).view(-1, 1, 1).expand(-1, 1, 2)
    _, seen = get_method("flowbp_lagrange", tau=0.01).loss(
        torch.zeros(1), 0.5, Rollout(latents, velocities, sigmas), k=torch.tensor([0]), j=torch.tensor([4])
    )
    assert float(seen["d_j"]) < 1e-6
    # One step remains, so one support: an Euler step of 0.1 with velocity 3 * 0.01 - 1, and the exact end is 0.
    assert float(seen["d_end"]) == pytest.approx(abs(0.1**3 - 0.1 - 0.1 * (3 * 0.01 - 1)), rel=1e-4)
    assert float(seen["w"]) == pytest.approx(1 / 0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leapaling", {}, "did you mean 'leapalign'"),
        ("leapalign", {"alhpa": 0.3}, "did you mean 'alpha'"),
        ("leapalign", {"alpha": -0.1}, "'alpha' is -0.1: input should be greater than or equal to 0"),
        ("leapalign", {"tau": 0}, "'tau' is 0: input should be greater than 0"),
        ("leapalign", {"alpha": "much"}, "valid number"),
    ],
)
def test_bad_options_name_the_remedy(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_method(name, **options)


def test_one_step_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        get_method("leapalign").draw(1, 2, generator())
