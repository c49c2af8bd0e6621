"""SPP's equations against closed forms and against an independent transcription."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppkit import spp

few = settings(derandomize=True, max_examples=60, deadline=None, database=None)


def transcription(rank: float, remaining: int, A: float, u: float) -> float:
    """SPP eq. (3) as the paper prints it."""
    alpha = (math.log(2) - math.log(u)) / remaining
    N = -math.log(u) / alpha
    if rank <= N:
        return A * math.exp(-alpha * rank)
    return 2 * u * A - A * math.exp(-alpha * (2 * N - rank))


@pytest.mark.parametrize("remaining", [1, 7, 400])
@pytest.mark.parametrize(("A", "u"), [(0.05, 0.25), (0.1, 0.5), (1.0, 0.01)])
def test_increment_is_equation_3(remaining: int, A: float, u: float) -> None:
    rank = torch.arange(0, 4 * remaining)
    found = spp.increment(rank, remaining, A=A, u=u)
    expected = [transcription(float(r), remaining, A, u) for r in rank]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-14)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("remaining", [1, 40, 1728])
@pytest.mark.parametrize(("A", "u"), [(0.05, 0.25), (0.2, 0.6)])
def test_increment_has_the_papers_properties(remaining: int, A: float, u: float) -> None:
    centre = remaining * math.log(1 / u) / math.log(2 / u)
    if u == 0.25:
        assert centre == pytest.approx(remaining * 2 / 3)

    def delta(r: float) -> float:
        return float(spp.increment(r, remaining, A=A, u=u))

    assert delta(0) == pytest.approx(A, abs=1e-15)
    assert delta(centre) == pytest.approx(u * A, abs=1e-15)
    assert delta(remaining) == pytest.approx(0, abs=1e-15)
    for x in np.linspace(0.01, 1, 7) * centre:  # point symmetry about (N, uA)
        assert delta(centre + x) + delta(centre - x) == pytest.approx(2 * u * A, abs=1e-14)
    curve = spp.increment(torch.linspace(0, 3 * remaining, 301), remaining, A=A, u=u)
    assert (curve.diff() < 0).all()
    beyond = 0.5 * remaining
    alpha = math.log(2 / u) / remaining
    assert delta(remaining + beyond) == pytest.approx(2 * u * A * (1 - math.exp(alpha * beyond)), rel=1e-9)


def test_the_strongest_group_loses_what_the_derivation_says() -> None:
    for ratio, loss, tolerance in ((0.5, 0.17, 0.01), (0.75, 0.025, 0.001), (0.9, 0.006, 0.001)):
        assert float(spp.increment(800, int(ratio * 800))) == pytest.approx(-loss, abs=tolerance)


def test_increment_does_not_overflow_far_beyond_the_target() -> None:
    values = spp.increment(torch.tensor([0, 1, 10_000]), 1)
    assert values.isfinite().all()
    assert values[2] < -1  # the clamp of eq. (4) makes it an immediate reset to 0


def reference_update(p: np.ndarray, importance: np.ndarray, target: int, A: float, u: float) -> np.ndarray:
    """One group after the other, with a count for a rank."""
    alive = [k for k in range(len(p)) if p[k] < 1]
    remaining = target - (len(p) - len(alive))
    out = p.copy()
    if remaining > 0:
        for k in alive:
            rank = sum((importance[j], j) < (importance[k], k) for j in alive)
            out[k] = min(max(p[k] + transcription(rank, remaining, A, u), 0.0), 1.0)
    return out


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    groups = draw(st.integers(1, 30))
    gone = draw(st.integers(0, groups))
    target = draw(st.integers(gone, groups))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(groups, generator=generator, dtype=torch.float64)
    p[torch.randperm(groups, generator=generator)[:gone]] = 1.0
    importance = torch.randperm(groups, generator=generator).double() ** 2  # all different
    return p, importance, target, seed


@few
@given(layers(), st.sampled_from([0.05, 0.4, 1.0]), st.sampled_from([0.1, 0.25, 0.9]))
def test_update_is_a_clamped_step_along_the_ranking(
    layer: tuple[torch.Tensor, torch.Tensor, int, int], A: float, u: float
) -> None:
    p, importance, target, seed = layer
    before = p.clone()
    new = spp.update(p, importance, target, A=A, u=u)
    assert torch.equal(p, before)  # a new tensor
    assert new.data_ptr() != p.data_ptr()
    np.testing.assert_allclose(new.numpy(), reference_update(p.numpy(), importance.numpy(), target, A, u), atol=1e-12)
    assert ((new >= 0) & (new <= 1)).all()
    assert (new[p == 1] == 1).all()
    assert int((new == 1).sum()) <= target
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(spp.update(p[order], importance[order], target, A=A, u=u), new[order])
    assert torch.equal(spp.update(p, importance.exp2().log1p(), target, A=A, u=u), new)  # the order alone counts
    shuffled = importance.clone()
    shuffled[p == 1] = -1e9  # groups that are gone are not ranked
    assert torch.equal(spp.update(p, shuffled, target, A=A, u=u), new)


@few
@given(layers(), st.sampled_from([torch.float32, torch.float64]))
def test_repeated_updates_end_at_exactly_the_target(
    layer: tuple[torch.Tensor, torch.Tensor, int, int], dtype: torch.dtype
) -> None:
    p, importance, target, seed = layer
    p, generator = p.to(dtype), torch.Generator().manual_seed(seed)
    p[p < 1] *= 0.99
    for _ in range(2000):
        gone = p == 1
        if int(gone.sum()) == target:
            break
        noisy = importance + 3 * torch.rand(len(p), generator=generator)  # ranks change as in training
        p = spp.update(p, noisy, target)
        assert p.dtype == dtype
        assert (p[gone] == 1).all()
        assert int((p == 1).sum()) <= target
    assert int((p == 1).sum()) == target
    assert torch.equal(spp.update(p, importance, target), p)


def test_equal_importance_is_ranked_by_position() -> None:
    p = spp.update(torch.zeros(6), torch.ones(6), 3)
    assert (p.diff()[:3] < 0).all()
    assert p[3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("groups", "fewest", "most"), [(75, 91, 117), (800, 149, 176), (2304, 175, 203)])
def test_static_norms_take_as_many_updates_as_the_simulation(groups: int, fewest: int, most: int) -> None:
    counts = []
    importance = torch.randperm(groups, generator=torch.Generator().manual_seed(0)).double()
    for ratio in (0.3, 0.5, 0.75, 0.9):
        target = spp.target_count(ratio, groups)
        p, count = torch.zeros(groups, dtype=torch.float64), 0
        while int((p == 1).sum()) < target:
            p, count = spp.update(p, importance, target), count + 1
            if count == 19:
                assert not (p == 1).any()  # 1/A = 20 updates at least
        counts.append(count)
        assert set(importance[p == 1].tolist()) == set(map(float, range(target)))  # the least important are gone
        assert int(((p > 0) & (p < 1)).sum()) <= 1
    assert fewest <= min(counts) <= max(counts) <= most


def test_a_low_precision_of_the_importance_does_not_round_the_target() -> None:
    p, importance = torch.zeros(800), torch.arange(800).to(torch.bfloat16)
    expected = spp.update(p, importance.float(), 598)
    assert not torch.equal(expected, spp.update(p, importance.float(), 600))  # what bfloat16 makes of 598
    assert torch.equal(spp.update(p, importance, 598), expected)


def test_update_refuses_bad_input() -> None:
    p, importance = torch.zeros(4), torch.arange(4.0)
    with pytest.raises(ValueError, match=r"probability \(4,\), importance \(3,\) must be"):
        spp.update(p, importance[:3], 2)
    with pytest.raises(ValueError, match=r"must be \(N_c,\)"):
        spp.update(p.view(2, 2), importance.view(2, 2), 2)
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
            spp.update(torch.tensor([0, bad, 0, 0]), importance, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 of 4 importances are NaN or infinite"):
            spp.update(p, torch.tensor([0, bad, 1, 2]), 2)
    for target in (-1, 5):
        with pytest.raises(ValueError, match=f"target={target} must lie in 0 to 4"):
            spp.update(p, importance, target)
    assert torch.equal(spp.update(p, importance, 0), p)


def test_increment_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="remaining=0 must be at least 1"):
        spp.increment(0, 0)
    for A, u in ((0, 0.25), (1.1, 0.25), (-0.1, 0.25), (math.nan, 0.25), (0.05, 0), (0.05, 1), (0.05, math.nan)):
        with pytest.raises(ValueError, match=r"A=.* must lie in \(0, 1\] and u=.* in \(0, 1\)"):
            spp.increment(0, 5, A=A, u=u)
    with pytest.raises(ValueError, match=r"A=2 must"):
        spp.update(torch.zeros(3), torch.arange(3.0), 1, A=2)


def test_masks_are_drawn_with_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
    generator, draws = torch.Generator().manual_seed(0), 4000
    kept = sum(spp.draw(p, generator).double() for _ in range(draws)) / draws
    sigma = (p * (1 - p) / draws).sqrt()
    assert ((kept - (1 - p)).abs() <= 4 * sigma).all()  # at 0 and 1: exactly
    joint = torch.stack([spp.draw(torch.full((2,), 0.5), generator) for _ in range(draws)])
    assert abs(float(joint.all(1).double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / draws)  # independent


def test_masks_come_from_the_generator_alone() -> None:
    p, state = torch.full((50,), 0.5), torch.get_rng_state()
    one, two = (spp.draw(p, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_target_count_is_the_exact_ceiling() -> None:
    assert math.ceil(0.28 * 75) == 22  # what floating point makes of 21
    assert spp.target_count(0.28, 75) == 21
    assert spp.target_count(1 - 1 / 3, 75) == 50
    for groups in (27, 75, 100, 800):
        for percent in range(1, 97):
            assert spp.target_count(percent / 100, groups) == -(-percent * groups // 100)
    assert spp.target_count(1e-9, 75) == 1
    for ratio in (0, 1, 1.4, -0.5, math.nan):
        with pytest.raises(ValueError, match=rf"ratio={ratio} must lie in \(0, 1\); leave a layer out"):
            spp.target_count(ratio, 75)
    with pytest.raises(ValueError, match=r"ratio=0.99 of 75 groups would leave none"):
        spp.target_count(0.99, 75)
