"""The controlled variants of SPP against what they say they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import driver
import numpy as np
import pytest
import torch
from settings import Experiment, Places
from torch import Tensor, nn
from torch.nn import functional as F
from training import Training, TrainingStep, networks
from training.data import load
from variants import VariedPruner, WatchedPruner, advance_by_norm, chosen, gone

from sppkit import spp
from sppkit.plan import make_plan
from sppkit.pruner import Pruner

LR, DECAY = 0.05, 0.02


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(36, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def set_up(**options: Any) -> tuple[nn.Sequential, VariedPruner, torch.optim.SGD]:
    net = network()
    plan = make_plan(net, torch.zeros(1, 3, 6, 6), ratio=0.5)
    pruner = VariedPruner(net, plan, weight_decay=DECAY, **{"interval": 1000} | options)
    pruner.probability.fill_(0.5)
    return net, pruner, torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)


def step(net: nn.Module, pruner: VariedPruner, optimizer: torch.optim.SGD, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad(set_to_none=False)
    pruner.mask()
    F.cross_entropy(net(x), y).backward()
    pruner.after(optimizer)
    optimizer.step()


@pytest.mark.parametrize("masked", ["decays", "still", "momentum", "trained"])
def test_what_happens_to_a_masked_group(masked: str) -> None:
    net, pruner, optimizer = set_up(masked=masked)
    for number in range(3):
        step(net, pruner, optimizer, number)
    weight = pruner._weight.clone()
    momentum, x, y = pruner._momentum.clone(), *batch(3)
    optimizer.zero_grad(set_to_none=False)
    pruner.mask()
    shown = [net[i].weight.detach().clone().requires_grad_() for i in (0, 2)]
    h = F.conv2d(F.relu(F.conv2d(x, shown[0], net[0].bias)), shown[1], net[2].bias)
    gradients = torch.autograd.grad(F.cross_entropy(net[4](h.flatten(1)), y), shown)
    F.cross_entropy(net(x), y).backward()
    pruner.after(optimizer)
    optimizer.step()
    hidden = ~pruner._mask.bool()
    assert 30 < int(hidden.sum()) < len(hidden) - 30
    velocity = {
        "decays": DECAY * weight,
        "still": 0 * weight,
        "momentum": 0.9 * momentum + DECAY * weight,
        "trained": 0.9 * momentum + torch.cat([g.flatten() for g in gradients]) + DECAY * weight,
    }[masked]
    torch.testing.assert_close(pruner._weight[hidden], (weight - LR * velocity)[hidden], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("ranking", ["norm", "taylor"])
def test_expected_masks_scale_weights_gradients_and_momentum(ranking: str) -> None:
    net, pruner, optimizer = set_up(masks="expected", ranking=ranking)
    pruner.probability.copy_(torch.rand(51, generator=torch.Generator().manual_seed(0)))
    pruner.probability[:5], pruner.probability[5:9] = 1.0, 0.0
    random = pruner.generator.get_state()
    for number in range(3):
        step(net, pruner, optimizer, number)
    weight, momentum = pruner._weight.clone(), pruner._momentum.clone()
    stays = 1 - pruner.probability
    share = torch.cat([stays[:27].expand(6, 27).flatten(), stays[27:].expand(4, 24).flatten()])
    shown = [
        (net[i].weight.detach() * stays[part].view(1, *net[i].weight.shape[1:])).requires_grad_()
        for i, part in ((0, slice(27)), (2, slice(27, 51)))
    ]
    x, y = batch(3)
    h = F.conv2d(F.relu(F.conv2d(x, shown[0], net[0].bias)), shown[1], net[2].bias)
    gradients = torch.autograd.grad(F.cross_entropy(net[4](h.flatten(1)), y), shown)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    step(net, pruner, optimizer, 3)
    velocity = 0.9 * share * momentum + share * flat + DECAY * weight
    torch.testing.assert_close(pruner._weight, weight - LR * velocity, rtol=1e-5, atol=1e-7)
    assert torch.equal(pruner.generator.get_state(), random), "nothing is drawn"


def test_expected_masks_of_0_and_1_are_masks() -> None:
    results = []
    for masks in ("drawn", "expected"):
        net, pruner, optimizer = set_up(masks=masks)
        pruner.probability.copy_((torch.arange(51) % 3 == 0).float())
        for number in range(4):
            step(net, pruner, optimizer, number)
        results.append((pruner._weight.clone(), pruner._momentum.clone()))
    for drawn, expected in zip(*results, strict=True):
        torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-8)


def test_expected_masks_end_at_the_plan_and_resume(tmp_path: Path) -> None:
    small = Experiment(
        "small", masks="expected", batch_size=16, baseline_steps=5, baseline_milestones=(), interval=1,
        prune_steps=60, retrain_steps=2, retrain_milestones=(), A=0.5,
    )  # fmt: skip
    record = driver.run(small, load("digits"), Places(tmp_path, revision="test"))
    assert record["flop_ratio"] == pytest.approx(2, rel=0.01)
    assert "decided" not in record["notes"]
    net, pruner, optimizer = set_up(masks="expected", interval=2)
    pruner.probability.zero_()
    for number in range(3):
        pruner.before()
        x, y = batch(number)
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), y).backward()
        pruner.after(optimizer)
        optimizer.step()
    _, other, _ = set_up(masks="expected", interval=2)
    other.load_state(pruner.state())
    assert other._steps == 3
    assert torch.equal(other.probability, pruner.probability)


def test_the_ranking_by_taylor_is_the_sum_over_the_steps_by_hand() -> None:
    net, pruner, optimizer = set_up(ranking="taylor")
    norms = net[0].weight.detach().abs().sum(0).flatten()
    torch.testing.assert_close(pruner.importance()[:27], norms)
    expected = torch.zeros(27)
    for number in range(4):
        x, y = batch(number)
        optimizer.zero_grad(set_to_none=False)
        pruner.mask()
        F.cross_entropy(net(x), y).backward()
        expected += (net[0].weight.grad * pruner._views_of_weight[0]).sum(0).abs().flatten().detach()
        pruner.after(optimizer)
        optimizer.step()
    torch.testing.assert_close(pruner.importance()[:27], expected)
    own = net[0].weight.detach().abs().sum(0).flatten()
    torch.testing.assert_close(pruner.importance()[:27], own)  # the sums start anew


@pytest.mark.parametrize("ranking", ["history", "masked"])
def test_summed_norms_by_hand(ranking: str) -> None:
    net, pruner, optimizer = set_up(ranking=ranking)
    expected = torch.zeros(27)
    for number in range(4):
        norms = net[0].weight.detach().abs().sum(0).flatten()
        step(net, pruner, optimizer, number)
        kept = pruner._mask[: 6 * 27].view(6, 27)[0]
        expected += norms * (kept if ranking == "masked" else 1)
    assert 0 < int(kept.sum()) < 27
    torch.testing.assert_close(pruner.importance()[:27], expected)
    own = net[0].weight.detach().abs().sum(0).flatten()
    torch.testing.assert_close(pruner.importance()[:27], own)  # the sums start anew


def test_norms_at_equal_distances_move_probabilities_as_their_ranks_do() -> None:
    generator = torch.Generator().manual_seed(0)
    p, target = torch.rand(3, 12, generator=generator), torch.tensor([9, 4, 1])
    norms = torch.stack([torch.randperm(12, generator=generator) * scale + 5.0 for scale in (0.1, 1, 30)])
    p[0, norms[0].argmin()] = 1.0  # the ranks of the others stay at equal distances
    moved = advance_by_norm(p, norms, target)
    torch.testing.assert_close(moved, spp.advance(p, norms, target), rtol=1e-6, atol=1e-7)
    order = torch.randperm(12, generator=generator)
    assert torch.equal(advance_by_norm(p[:, order], norms[:, order], target), moved[:, order])


def test_a_group_whose_norm_is_near_the_threshold_hardly_moves_by_norm() -> None:
    norms = torch.tensor([[1.0, 1.9, 1.99, 2.0, 8.0, 9.0, torch.inf]])  # a layer filled up
    p = torch.tensor([[0.5] * 6 + [1.0]])
    by_norm, by_rank = (f(p, norms, torch.tensor([4])) - p for f in (advance_by_norm, spp.advance))
    assert by_norm[0, 3] == by_rank[0, 3] == 0
    assert 0 < by_norm[0, 2] < 0.1 * by_rank[0, 2]
    torch.testing.assert_close(by_norm[0, 0], torch.tensor(0.05))
    torch.testing.assert_close(by_norm[0, 5], by_rank[0, 5])
    assert (by_norm[0, :3] > 0).all()
    assert (by_norm[0, 4:6] < 0).all()
    same = advance_by_norm(p, norms.clamp(max=3).masked_fill(norms < 9, 3.0), torch.tensor([4]))  # all norms alike
    assert torch.equal(same, p)


@pytest.mark.parametrize("ranking", ["raw", "history", "masked"])
def test_these_rankings_end_at_the_plan(ranking: str, tmp_path: Path) -> None:
    small = Experiment(
        "small", ranking=ranking, batch_size=16, baseline_steps=5, baseline_milestones=(), interval=1,
        prune_steps=80, retrain_steps=2, retrain_milestones=(), A=0.5,
    )  # fmt: skip
    record = driver.run(small, load("digits"), Places(tmp_path, revision="test"))
    assert record["flop_ratio"] == pytest.approx(2, rel=0.01)


def test_the_sums_are_saved_with_the_weights(tmp_path: Path) -> None:
    digits, settings = load("digits"), Training(steps=3, batch_size=16, lr=1e-3)
    for seed in range(2):
        net = networks.create("resnet20", seed=seed)
        plan = make_plan(net, torch.zeros(1, 3, 32, 32), ratio=0.5, layers=["conv1"])
        pruner = VariedPruner(net, plan, ranking="taylor", interval=10)
        step = TrainingStep(net, digits, settings, pruner=pruner)
        if seed == 0:
            step.step(0)
            step.save(tmp_path / "file", 1, [])
            wanted = pruner.sums["taylor"].clone()
            assert wanted.any()
        else:
            step.resume(tmp_path / "file")
            assert torch.equal(pruner.sums["taylor"], wanted)


def test_the_first_ranking_stays() -> None:
    net, pruner, optimizer = set_up(ranking="first")
    norms = net[0].weight.detach().abs().sum(0).flatten()
    step(net, pruner, optimizer, 0)
    torch.testing.assert_close(pruner.importance()[:27], norms)
    assert float((net[0].weight.detach().abs().sum(0).flatten() - norms).abs().max()) > 1e-3


def test_a_column_gains_by_what_its_siblings_lose() -> None:
    net, pruner, _ = set_up(siblings=0.5)
    norms = torch.cat([net[i].weight.detach().abs().sum(0).flatten() for i in (0, 2)])  # 3 channels of 9, 6 of 4 taps
    torch.manual_seed(0)
    pruner.probability.copy_(torch.rand(51))
    pruner.probability[9:18] = 1.0  # a channel that is gone
    kept = 1 - pruner.probability
    sums = torch.cat(
        [kept[:27].view(3, 9).sum(1).repeat_interleave(9), kept[27:].view(6, 4).sum(1).repeat_interleave(4)]
    )
    torch.testing.assert_close(pruner.importance(), norms / sums.clamp(min=0.1).sqrt())
    assert pruner.importance().isfinite().all()


@pytest.mark.parametrize("method", ["spp", "gradual"])
def test_over_the_network_the_least_important_per_mac_go_until_the_flop_ratio(method: str) -> None:
    net = network()
    plan = make_plan(net, torch.zeros(1, 3, 6, 6), flop_ratio=2)
    pruner = VariedPruner(net, plan, method=method, scope="network", ranking="taylor", interval=1, rounds=6)
    importance = torch.rand(51, generator=torch.Generator().manual_seed(1))
    pruner.update()  # the first ranking is by norms
    while not pruner.finished:
        assert pruner.updates < 300
        pruner._sums[:51] = importance
        pruner.update()
    gone = pruner.gone.numpy()
    macs = torch.tensor([96.0] * 27 + [36.0] * 24)  # of a column: 6 filters by 4x4, 4 filters by 3x3
    per_mac = importance / macs
    assert pruner.groups.flop_ratio(gone) == pytest.approx(2, abs=0.06), "one column is 0.03 at most"
    stays = torch.from_numpy(~gone)
    assert per_mac[~stays].max() < per_mac[stays].min()


def test_over_the_network_every_layer_keeps_its_best_group() -> None:
    net = network()
    pruner = VariedPruner(
        net, make_plan(net, torch.zeros(1, 3, 6, 6), flop_ratio=3.5), scope="network", ranking="taylor", interval=1
    )
    pruner.update()
    while not pruner.finished:
        pruner._sums[:51] = torch.cat([torch.arange(27.0) * 1e-6 + 1e-6, torch.full((24,), 100.0)])
        pruner.update()
    assert pruner.gone[:26].all()
    assert not pruner.gone[26]


@pytest.mark.parametrize("method", ["spp", "gradual", "oneshot"])
def test_chosen_groups_go_and_no_others(method: str) -> None:
    _, pruner, _ = set_up(method=method, rounds=5)
    pruner.probability.zero_()
    generator, wanted = np.random.default_rng(0), np.zeros(pruner.groups.count, dtype=bool)
    for name, part in pruner.slices.items():
        wanted[part][generator.permutation(pruner.groups.sizes[name])[: pruner.plan.targets[name]]] = True
    digits = np.packbits(wanted).tobytes().hex()
    assert np.array_equal(gone(digits, len(wanted)), wanted)
    pruner.choose({"notes": {"gone": digits}})
    while not pruner.finished:
        assert pruner.updates < 300
        pruner.update()
    assert np.array_equal(pruner.gone.numpy(), wanted)
    assert chosen(pruner) == digits


def test_the_state_of_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="of another plan or method"):
        set_up(masked="still")[1].load_state(set_up(masked="trained")[1].state())


def test_other_names_are_refused() -> None:
    for option, message in (
        ({"masked": "frozen"}, "masked='frozen' must be"),
        ({"ranking": "l2"}, "ranking='l2' must"),
        ({"scope": "block"}, "scope='block' must"),
        ({"scope": "network"}, "scope='network' needs a FLOP ratio"),
        ({"masks": "mean"}, "masks='mean' must be one of drawn, expected"),
        ({"masks": "expected", "masked": "still"}, "masks='expected' is SPP without masked groups; got 'spp', 'still'"),
        ({"masks": "expected", "method": "ssl"}, "masks='expected' is SPP without masked groups; got 'ssl'"),
    ):
        with pytest.raises(ValueError, match=message):
            set_up(**option)
    with pytest.raises(ValueError, match="rule='best' must be one of uniform, tiers, pca"):
        Experiment("x", rule="best")


def test_an_experiment_prunes_the_columns_of_another_method(tmp_path: Path) -> None:
    small = Experiment(
        "small", method="gradual", columns_of="oneshot", batch_size=16, baseline_steps=5, interval=1, rounds=4,
        prune_steps=12, retrain_steps=2, retrain_milestones=(), retrain_weight_decay=0.5,
    )  # fmt: skip
    places = Places(tmp_path, revision="test")
    record = driver.run(small, load("digits"), places)
    source = places.find(replace(small, method="oneshot", columns_of=""))
    assert source is not None
    assert record["notes"]["gone"] == source["notes"]["gone"]
    assert math.isclose(np.mean(gone(record["notes"]["gone"], 1675)), 0.5, abs_tol=0.05)
    assert small.phase("retrain").weight_decay == 0.5
    assert small.phase("prune").weight_decay == 0.004


def test_a_plan_by_pca_weighs_the_layers() -> None:
    digits, plain = load("digits"), Experiment("x", flop_ratio=4)
    net = networks.create("convnet")
    uniform, pca = (driver.make_pruner(net, digits, replace(plain, rule=rule)).plan for rule in ("uniform", "pca"))
    assert uniform.targets != pca.targets
    assert pca.reached == pytest.approx(4, rel=0.01)
    assert not isinstance(driver.make_pruner(net, digits, plain), VariedPruner), "the paper's method is not a variant"


def test_a_watched_pruner_knows_every_rank_and_prunes_like_any_other() -> None:
    probabilities = []
    for watched in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2))
        plan = make_plan(net, torch.zeros(1, 3, 8, 8), ratio=0.5)
        pruner = WatchedPruner(net, plan, A=0.4, most=30) if watched else Pruner(net, plan, A=0.4)
        for number in range(12):
            gone_before = pruner.gone.clone()
            norms = [net[i].weight.detach().abs().sum(0).flatten() for i in (0, 2)]
            pruner.update()
            if isinstance(pruner, WatchedPruner):
                for part, norm in zip(pruner.slices.values(), norms, strict=True):
                    ranks, went = pruner.ranks[number, part], gone_before[part]
                    assert (norm[ranks.long().argsort()].diff() >= 0).all(), "ascending"
                    assert (ranks[went] < went.sum()).all(), "those that are gone have the smallest"
        assert pruner.gone.any()
        probabilities.append(pruner.probability.clone())
    assert torch.equal(*probabilities)
