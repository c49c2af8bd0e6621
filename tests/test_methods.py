"""The methods under one driver: who goes, when, and where it ends. And SPP's options, views and several processes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rivals
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from training import Batches, Normalise, view
from training.data import Split

from sppkit import methods, spp
from sppkit.compact import compact
from sppkit.cost import flop_ratio
from sppkit.groups import Groups
from sppkit.plan import Plan, make_plan
from sppkit.pruner import Pruner

GOALS = {"0": 20, "2": 60}


def chain(seed: int = 0) -> nn.Sequential:
    """Two prunable convolutions for 6-pixel images; no BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(160, 4))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 6, 6, generator=generator), torch.randint(4, (size,), generator=generator)


def prune(network: nn.Module, **options: Any) -> Pruner:
    plan = {key: options.pop(key) for key in ("flop_ratio", "ratio", "kind") if key in options}
    if plan.keys() & {"flop_ratio", "ratio"}:
        return Pruner(network, make_plan(network, batch(0)[0], **plan), **options)
    targets = options.pop("targets", GOALS)
    return Pruner(network, Plan(Groups(network, batch(0)[0], layers=[*targets], **plan), targets), **options)


def train(network: nn.Module, pruner: Pruner, steps: int, **options: float) -> None:
    solver = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3} | options
    optimizer = torch.optim.SGD(network.parameters(), **solver)
    for step in range(steps):
        x, y = batch(step)
        pruner.before()
        F.cross_entropy(network(x), y).backward()
        pruner.after(optimizer)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_ends_at_the_flop_ratio(method: str) -> None:
    kind = "filter" if method == "taylor" else "column"
    network = chain()
    score = lambda: rivals.scores(network, pruner.groups, [batch(0)])  # noqa: E731
    how: dict[str, Any] = {"interval": 1, "rounds": 12, "A": 0.3, "score": score if method == "taylor" else None}
    pruner = prune(network, method=method, flop_ratio=2.5, kind=kind, **how)
    train(network, pruner, 60)
    assert pruner.finished
    assert set(pruner.probability.tolist()) == {0.0, 1.0}
    small = compact(network, batch(0)[0])
    grid = 0.15 if kind == "filter" else 0.05  # what one filter, or one column with a filter it takes along, is worth
    assert flop_ratio(network, small, batch(0)[0]) == pytest.approx(2.5, abs=grid)


@pytest.mark.parametrize("method", ["spp", "deterministic", "oneshot", "gradual", "random", "ssl"])
def test_ratios_are_met_exactly(method: str) -> None:
    network = chain()
    pruner = prune(network, method=method, ratio=0.4, interval=1, rounds=10, A=0.3)
    train(network, pruner, 80)
    assert pruner.table()["pruned"].tolist() == [11, 44]  # ceil(0.4 * 27), ceil(43.2)


def test_one_shot_takes_the_smallest_norms_at_the_first_update() -> None:
    network = chain()
    pruner = prune(network, method="oneshot")
    norms = {name: network.get_submodule(name).weight.detach().abs().sum(0).flatten() for name in GOALS}
    pruner.update()
    assert pruner.finished
    for name, goal in GOALS.items():
        expected = norms[name].argsort()[:goal].sort().values
        assert torch.equal(pruner.gone[pruner.slices[name]].nonzero().flatten(), expected)


def test_random_groups_depend_on_the_seed_alone() -> None:
    drawn = []
    for seed, weights in ((0, 0), (0, 1), (1, 0)):
        pruner = prune(chain(weights), method="random", seed=seed)
        pruner.update()
        drawn.append(pruner.gone)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    other = prune(chain(), method="random", seed=1)
    other.generator.set_state(prune(chain(), seed=0).generator.get_state())  # as several processes get rank 0's
    other.update()
    assert torch.equal(other.gone, drawn[0])


def test_gradual_masks_follow_the_cubic_share_and_can_be_lifted() -> None:
    network = chain()
    pruner = prune(network, method="gradual", rounds=5)
    small = network[0].weight.detach().abs().sum(0).flatten().argmin()
    for k in range(1, 5):
        pruner.update()
        share = 1 - (1 - k / 5) ** 3
        found = [int(pruner.probability[part].sum()) for part in pruner.slices.values()]
        assert found == [math.floor(share * goal + 1e-6) for goal in GOALS.values()]
        assert (pruner.probability[small] == 1) == (k == 1)
        network[0].weight.data.flatten(1)[:, small] = 9.0  # its norm grows: it is not masked again
    pruner.update()
    assert pruner.finished
    assert network[0].weight.flatten(1)[:, small].eq(9).all()


def test_deterministic_pruning_never_masks_what_is_not_gone() -> None:
    network = chain()
    pruner = prune(network, method="deterministic", interval=1, A=0.2)
    while not pruner.finished:
        before = pruner.trace[-1].clone() if pruner.trace else torch.zeros(pruner.groups.count)
        pruner.update()
        assert (pruner.trace[-1] >= before).all()
        assert set(pruner.probability.tolist()) <= {0.0, 1.0}
        assert torch.equal(pruner.probability == 1, pruner.gone)


def test_ssl_adds_the_group_lasso_until_it_is_finished() -> None:
    network = chain()
    pruner = prune(network, method="ssl", rounds=2)
    gradients = []
    for _ in range(2):
        x, y = batch(0)
        pruner.mask()
        plain = torch.autograd.grad(F.cross_entropy(network(x), y), network[2].weight)[0]
        pruner._gradient.zero_()
        F.cross_entropy(network(x), y).backward()
        pruner.unmask()
        gradients.append(network[2].weight.grad - plain * network[2].weight.ne(0))
        pruner.update()
        pruner.update()
    weight = chain()[2].weight.detach()
    expected = rivals.SSL_STRENGTH * weight / weight.square().sum(0, keepdim=True).sqrt()
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-8)
    assert gradients[1].abs().max() < 1e-8  # finished after two updates


def test_taylor_scores_are_gradient_times_feature_map() -> None:
    network = chain()
    groups = make_plan(network, batch(0)[0], ratio=0.5, kind="filter").groups
    found = rivals.scores(network, groups, [batch(0), batch(1)])
    by_layer: dict[str, Tensor] = {}
    for name in groups.layers:
        total = torch.zeros(len(network.get_submodule(name).weight))
        for x, y in (batch(0), batch(1)):
            for image in range(len(x)):
                z = network[: int(name) + 1](x[image : image + 1]).detach().requires_grad_()
                loss = F.cross_entropy(network[int(name) + 1 :](z), y[image : image + 1])
                total += (torch.autograd.grad(loss, z)[0] * z).sum((0, 2, 3)).abs().detach()
        by_layer[name] = total / total.norm()
    torch.testing.assert_close(found, torch.cat([*by_layer.values()]), rtol=1e-4, atol=1e-6)
    assert network[0].weight.grad is None


def test_a_layer_keeps_one_filter_whatever_the_scores() -> None:
    network = chain()
    score = lambda: torch.cat([torch.zeros(12), torch.ones(10)])  # noqa: E731  all of the first layer score lowest
    pruner = prune(network, method="taylor", kind="filter", flop_ratio=20, rounds=1, score=score)
    pruner.update()
    assert int(pruner.gone[pruner.slices["0"]].sum()) == 11


def test_the_literal_form_ranks_all_groups_and_keeps_the_whole_target() -> None:
    importance = torch.arange(20.0)
    p = torch.tensor([1.0] * 5 + [0.0] * 15)
    found = spp.update(p, importance, 10, form="literal")
    expected = [1.0] * 5 + [max(float(spp.increment(rank, 10)), 0.0) for rank in range(5, 20)]
    assert found.tolist() == pytest.approx(expected)
    adaptive = spp.update(p, importance, 10)
    assert adaptive.tolist() == pytest.approx([1.0] * 5 + [max(float(spp.increment(r, 5)), 0.0) for r in range(15)])


@pytest.mark.parametrize("seed", range(5))
def test_the_literal_form_prunes_no_more_than_its_target(seed: int) -> None:
    """Although a score may rank groups that are gone anywhere: here it walks at random."""
    generator = torch.Generator().manual_seed(seed)
    p, walk = torch.zeros(40, dtype=torch.float64), torch.rand(40, generator=generator)
    for _ in range(600):
        walk += 0.3 * torch.randn(40, generator=generator)
        p = spp.update(p, walk.abs(), 20, form="literal", A=1.0)
    assert int((p == 1).sum()) == 20


def test_taylor_needs_a_score() -> None:
    with pytest.raises(ValueError, match="method='taylor' needs score"):
        prune(chain(), method="taylor", kind="filter", flop_ratio=2).update()


def test_the_literal_form_takes_far_more_updates() -> None:
    counts = {}
    for form in spp.FORMS:
        p, counts[form] = torch.zeros(75, dtype=torch.float64), 0
        while int((p == 1).sum()) < 38:
            p = spp.update(p, torch.arange(75.0), 38, form=form)
            counts[form] += 1
    last = float(spp.increment(37, 38))  # what the group just below the target gains
    assert counts["literal"] == math.ceil(1 / last)
    assert counts["literal"] > 3 * counts["adaptive"]


def test_literal_pruning_ends_at_the_ratio_in_training() -> None:
    network = chain()
    pruner = prune(network, form="literal", interval=1, A=1.0, targets={"0": 6})
    train(network, pruner, 120)
    assert pruner.finished
    assert int(pruner.gone[pruner.slices["0"]].sum()) == 6


def test_groups_recover_in_training() -> None:
    network = chain()
    pruner = prune(network, interval=3, A=0.3)
    train(network, pruner, 60)
    back = (torch.stack(pruner.trace) > 0.5).any(0) & ~pruner.gone
    assert 0 < pruner.table()["recovered"].sum() <= int(back.sum())


def test_a_group_that_becomes_important_comes_back() -> None:
    network = chain()
    pruner = prune(network, targets={"0": 10}, interval=1)
    low = int(network[0].weight.detach().abs().sum(0).flatten().argmin())
    for _ in range(12):
        pruner.update()
    assert pruner.probability[low] > 0.5
    network[0].weight.data.flatten(1)[:, low] = 5.0
    while not pruner.finished:
        pruner.update()
    assert not pruner.gone[low]
    assert network[0].weight.flatten(1)[:, low].eq(5).all()
    assert pruner.table()["recovered"].tolist() == [1]


@pytest.mark.parametrize("rescale", [False, True])
def test_survivors_are_rescaled_if_asked(rescale: bool) -> None:
    network = chain()
    pruner = prune(network, targets={"0": 10}, rescale=rescale)
    p = torch.linspace(0, 0.9, 27)
    pruner.probability.copy_(p)
    before = network[0].weight.detach().clone()
    pruner.keep(torch.ones(27, dtype=torch.bool))
    share = (1 - p).view(1, 3, 3, 3) if rescale else 1.0
    torch.testing.assert_close(network[0].weight.detach(), before * share)
    assert not pruner.probability.any()


@pytest.mark.parametrize("gradient", ["exact", "unmasked"])
def test_the_gradient_of_the_input_goes_through_masked_or_unmasked_weights(gradient: str) -> None:
    network = chain()
    pruner = prune(network, gradient=gradient)
    pruner.probability.fill_(0.5)
    weights = [network[i].weight.detach().clone() for i in (0, 2)]
    x, y = batch(3)
    x.requires_grad_()
    pruner.mask()
    masked = [network[i].weight.detach().clone() for i in (0, 2)]
    loss = F.cross_entropy(network(x), y)
    if gradient == "unmasked":
        pruner.restore()
    loss.backward()
    pruner.unmask()
    z1 = F.conv2d(x.detach(), masked[0], network[0].bias, padding=1).detach().requires_grad_()
    z2 = F.conv2d(F.relu(z1), masked[1], network[2].bias).detach().requires_grad_()
    d2 = torch.autograd.grad(F.cross_entropy(network[5](F.relu(z2).flatten(1)), y), z2)[0]
    used = weights if gradient == "unmasked" else masked
    d1 = F.conv_transpose2d(d2, used[1]) * (z1 > 0)
    torch.testing.assert_close(x.grad, F.conv_transpose2d(d1, used[0], padding=1), rtol=1e-4, atol=1e-7)
    for i, weight in zip((0, 2), weights, strict=True):
        assert torch.equal(network[i].weight.detach(), weight)


def test_views_show_the_network_and_give_it_back() -> None:
    network = chain()
    pruner = prune(network)
    pruner.probability.copy_(torch.linspace(0, 1, pruner.groups.count))
    pruner.remove(np.arange(pruner.groups.count) >= pruner.groups.count - 3, last=False)
    before, state = network[0].weight.detach().clone(), pruner.generator.get_state()
    p = pruner.probability[:27].view(1, 3, 3, 3)
    for kind, share in (("expected", 1 - p), ("threshold", (p < 0.5).float()), ("unmasked", torch.ones_like(p))):
        with view(pruner, kind):
            torch.testing.assert_close(network[0].weight.detach(), before * share)
        assert torch.equal(network[0].weight.detach(), before)
    with view(pruner, "unmasked"):
        assert not network[2].weight.flatten(1)[:, -3:].any()
    with view(pruner, "sampled"):
        kept = network[2].weight.ne(0).flatten(1)
    assert torch.equal(kept.all(0), kept.any(0))
    assert 20 < int(kept.any(0).sum()) < 55  # p rises from 0.2 to 1
    assert torch.equal(pruner.generator.get_state(), state)
    with pytest.raises(ValueError, match="view 'mean' must be one of sampled"), view(pruner, "mean"):
        pass


def test_momentum_of_ones_own_optimizer_is_cleared() -> None:
    network = chain()
    pruner = prune(network, interval=1000)
    pruner.probability.fill_(0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        pruner.before()
        F.cross_entropy(network(batch(step)[0]), batch(step)[1]).backward()
        pruner.after(optimizer)
        optimizer.step()
        masked = ~pruner._mask.bool()
        assert 0 < int(masked.sum()) < len(masked)
        assert not pruner._momentum[masked].any()
        assert pruner._momentum[~masked].any()
        optimizer.zero_grad()  # to None: the pruner's gradient must be found again


def test_an_optimizer_without_momentum_is_refused_and_left_alone() -> None:
    network = chain()
    pruner, optimizer = prune(network), torch.optim.Adam(network.parameters())
    with pytest.raises(ValueError, match=r"Adam has no momentum to clear: use torch\.optim\.SGD, or after"):
        pruner.after(optimizer)
    assert not optimizer.state
    pruner.before()
    F.cross_entropy(network(batch(0)[0]), batch(0)[1]).backward()
    pruner.after()
    optimizer.step()


def test_a_saved_state_of_a_finished_pruner_is_finished() -> None:
    pruner = prune(chain(), method="ssl", rounds=1)
    pruner.update()
    other = prune(chain(), method="ssl", rounds=1)
    other.load_state(pruner.state())
    assert other.finished
    assert float(other._going) == 0
    assert torch.equal(other.gone, pruner.gone)


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_networks_can_be_pruned(name: str) -> None:
    import torchvision

    network = torchvision.models.get_model(name, num_classes=3)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network.eval()
    pruner = Pruner(network, make_plan(network, x, flop_ratio=1.5), method="oneshot")
    pruner.update()
    small = compact(network, x, tolerance=1e-8)
    assert flop_ratio(network, small, x) == pytest.approx(1.5, rel=0.01)


def augmented() -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 6, 6, 3), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(4, (64,), generator=generator))
    normalise = Normalise.of(split, "channel")
    return Batches(split, batch_size=16, seed=3, normalise=normalise, crop_padding=1, flip=True)


def chain_with_frozen_norm() -> nn.Sequential:
    """The chain with a BatchNorm after its first convolution that is frozen: no rank's batch enters its statistics."""
    first, relu, *rest = chain()
    norm = nn.BatchNorm2d(first.out_channels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        tensor.data.uniform_(0.5, 1.5, generator=generator)
    return nn.Sequential(first, nn.Sequential(norm, relu), *rest)  # layers keep their names


def one_process(rank: int, world: int, path: str, port_file: str) -> None:
    """Train the chain on its share of each global batch and save weights and masks."""
    torch.set_num_threads(1)
    network: nn.Module = chain_with_frozen_norm()
    pruner = prune(network, interval=2, A=0.1, seed=5 + rank)  # the masks are those of rank 0
    trained = network
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
        trained = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    masks = []
    batches = augmented()
    for step in range(40):
        if step % batches.steps_per_epoch == 0:
            batches.start_epoch(step // batches.steps_per_epoch)
        x, y = batches.select(step % batches.steps_per_epoch).batch()  # crops and flips go with a sample's index
        pruner.before()
        F.cross_entropy(trained(x[rank::world]), y[rank::world]).backward()
        pruner.after(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        masks.append(pruner._keep.clone())
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.save({"weights": weights, "masks": torch.stack(masks), "p": pruner.probability}, f"{path}/{world}-{rank}.pt")
    if world > 1:
        dist.barrier()
        os._exit(0)  # torch's teardown of gloo under DDP can wait for ever: its thread wants the interpreter's lock


def test_two_processes_hold_the_same_masks_and_equal_one(tmp_path: Path) -> None:
    one_process(0, 1, str(tmp_path), "")
    arguments, end = (2, str(tmp_path), str(tmp_path / "rendezvous")), time.monotonic() + 240
    processes = mp.spawn(one_process, args=arguments, nprocs=2, join=False, daemon=True)
    while not processes.join(timeout=5):
        assert time.monotonic() < end, "two processes did not end in time"
    single, first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    assert torch.equal(first["masks"], second["masks"])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(single["masks"], first["masks"])
    assert 0 < float(first["p"].mean()) < 1
    start = torch.cat([p.detach().flatten() for p in chain_with_frozen_norm().parameters()])
    moved = (single["weights"] - start).norm()
    assert float((single["weights"] - first["weights"]).norm() / moved) < 1e-4


def test_pruning_by_the_ceiling_of_a_ratio_never_empties_a_layer() -> None:
    pruner = prune(chain(), ratio=0.96, method="oneshot")
    pruner.update()
    assert [int((~pruner.gone[part]).sum()) for part in pruner.slices.values()] == [1, 4]
    assert np.isfinite(pruner.groups.flop_ratio(pruner.gone.numpy()))
