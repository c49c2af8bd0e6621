"""The pruner against a slow reference that keeps every layer's masks by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import networks, view

from sppkit import spp
from sppkit.groups import Groups
from sppkit.plan import Plan
from sppkit.pruner import Pruner

LR, MOMENTUM, DECAY = 0.005, 0.9, 0.005


class Small(nn.Module):
    """Two pruned convolutions, one that is left alone, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, (1, 2), bias=False)
        self.free = nn.Conv2d(5, 4, 1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.linear(F.relu(self.free(x)).mean((2, 3)))


TARGETS = {"one": 14, "two": 5}


def prune(network: nn.Module, goals: dict[str, int] | None = None, **options: Any) -> Pruner:
    goals = goals or TARGETS
    return Pruner(network, Plan(Groups(network, torch.zeros(1, 3, 5, 6), layers=[*goals]), goals), **options)


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 3, 5, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def step(network: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, number: int) -> None:
    x, y = batch(number)
    pruner.mask()
    F.cross_entropy(network(x), y).backward()
    pruner.unmask()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Reference:
    """SPP in training, one layer and one column at a time, on copies of the weights."""

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.w = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.p = {name: np.zeros(self.w[f"{name}.weight"][0].numel()) for name in TARGETS}
        self.generator = torch.Generator().manual_seed(seed)

    def update(self) -> None:
        for name, p in self.p.items():
            weight = self.w[f"{name}.weight"]
            filters, C, kh, kw = weight.shape
            columns = [(c, i, j) for c in range(C) for i in range(kh) for j in range(kw)]
            norms = [sum(abs(float(weight[o, c, i, j])) for o in range(filters)) for c, i, j in columns]
            alive = [k for k in np.argsort(norms, kind="stable") if p[k] < 1]
            remaining = TARGETS[name] - (len(p) - len(alive))
            if remaining == 0:
                continue
            alpha = math.log(2 / 0.25) / remaining
            N = -math.log(0.25) / alpha
            for rank, k in enumerate(alive):
                rise = math.exp(-alpha * rank) if rank <= N else 0.5 - math.exp(-alpha * (2 * N - rank))
                p[k] = min(max(p[k] + 0.05 * rise, 0), 1)
            if (p == 1).sum() == TARGETS[name]:
                p[p < 1] = 0
            for k, (c, i, j) in enumerate(columns):
                if p[k] == 1:
                    weight[:, c, i, j] = 0
                    self.v[f"{name}.weight"][:, c, i, j] = 0

    def step(self, number: int) -> dict[str, Tensor]:
        x, y = batch(number)
        draws = torch.rand(sum(map(len, self.p.values())) + 2, generator=self.generator).tolist()
        masks = {}
        for name, p in self.p.items():
            weight = self.w[f"{name}.weight"]
            mask = torch.tensor([float(draws.pop(0) >= pk) for pk in p])
            masks[f"{name}.weight"] = mask.view(1, *weight.shape[1:]).expand_as(weight)
        leaves = {name: value.clone().requires_grad_() for name, value in self.w.items()}
        m = {name: leaf * masks[name] if name in masks else leaf for name, leaf in leaves.items()}
        h = F.relu(F.conv2d(x, m["one.weight"], m["one.bias"], padding=1))
        h = F.relu(F.conv2d(F.relu(F.conv2d(h, m["two.weight"])), m["free.weight"], m["free.bias"]))
        logits = h.mean((2, 3)) @ m["linear.weight"].T + m["linear.bias"]
        loss = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name in self.w:
            if name in masks:
                self.v[name] = self.v[name] * masks[name]  # the momentum goes before the decay is added
                gradients[name] = gradients[name] * masks[name]
            self.v[name] = MOMENTUM * self.v[name] + gradients[name] + DECAY * self.w[name]
            self.w[name] = self.w[name] - LR * self.v[name]
        return masks


@pytest.mark.usefixtures("double_precision")
def test_training_is_the_slow_reference_from_the_first_step_to_beyond_the_last_update() -> None:
    network = small()
    reference = Reference(network, seed=3)
    pruner = prune(network, interval=2, seed=3)
    optimizer = sgd(network)
    pruner.attach(optimizer)
    masked = updates = 0
    number = after = 0
    while after < 40:
        assert number < 1000
        after += pruner.finished
        if number % 2 == 0 and not pruner.finished:
            pruner.update()
            reference.update()
            updates += 1
        step(network, pruner, optimizer, number)
        masks = reference.step(number)
        masked += int(sum((1 - mask).sum() for mask in masks.values()))
        for name, value in network.named_parameters():
            torch.testing.assert_close(value.detach(), reference.w[name], rtol=1e-9, atol=1e-11)
            momentum = optimizer.state[value]["momentum_buffer"]
            torch.testing.assert_close(momentum, reference.v[name], rtol=1e-9, atol=1e-11)
        for name, p in reference.p.items():
            np.testing.assert_allclose(pruner.probability[pruner.slices[name]].numpy(), p, atol=1e-12)
        number += 1
    assert masked > 1000
    assert updates == pruner.updates == len(pruner.trace) > 20
    assert all(int((p == 1).sum()) == TARGETS[name] for name, p in reference.p.items())


def set_up(seed: int = 0, **options: Any) -> tuple[Small, Pruner, torch.optim.SGD]:
    network = small()
    pruner = prune(network, seed=seed, **options)
    optimizer = sgd(network)
    pruner.attach(optimizer)
    return network, pruner, optimizer


def test_a_masked_group_gets_no_gradient_and_keeps_its_value_but_decays() -> None:
    network, pruner, optimizer = set_up(interval=3)
    for number in range(3):  # momentum is there, and the masks of an interval are used up
        step(network, pruner, optimizer, number)
    weight = network.one.weight.detach().clone()
    momentum = optimizer.state[network.one.weight]["momentum_buffer"]
    assert momentum.ne(0).all()
    pruner.probability.fill_(0.5)
    x, y = batch(9)
    pruner.mask()
    keep = network.one.weight.detach().ne(0).all(0)  # (C, kh, kw)
    assert torch.equal(network.one.weight.detach(), weight * keep)
    assert 5 < int(keep.sum()) < 22
    bias = network.one.bias.detach().clone()
    F.cross_entropy(network(x), y).backward()
    pruner.unmask()
    assert torch.equal(network.one.weight.detach(), weight)
    assert not network.one.weight.grad[:, ~keep].any()
    assert network.one.weight.grad[:, keep].ne(0).any(0).all()
    assert not momentum[:, ~keep].any()
    assert momentum[:, keep].ne(0).all()
    optimizer.step()
    torch.testing.assert_close(network.one.weight.detach()[:, ~keep], weight[:, ~keep] * (1 - LR * DECAY))
    assert not torch.equal(network.one.bias.detach(), bias)


def test_biases_and_other_layers_are_never_masked() -> None:
    network, pruner, _ = set_up()
    pruner.probability.fill_(1.0)
    names = ["one.bias", "free.weight", "free.bias", "linear.weight", "linear.bias"]
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    pruner.mask()
    after = dict(network.named_parameters())
    assert all(torch.equal(before[name], after[name].detach()) for name in names)
    assert not network.one.weight.detach().any()
    assert not network.two.weight.detach().any()


def test_attaching_changes_no_value_and_keeps_the_momentum_there_was() -> None:
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = sgd(network)
    F.cross_entropy(network(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    momentum = optimizer.state[network.two.weight]["momentum_buffer"].clone()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruner = prune(network)
    pruner.attach(optimizer)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(optimizer.state[network.two.weight]["momentum_buffer"], momentum)
    assert momentum.any()


def test_pruned_groups_are_zero_for_good_and_survivors_go_to_zero_probability() -> None:
    network, pruner, optimizer = set_up(interval=1)
    gone = torch.zeros_like(pruner.probability, dtype=torch.bool)
    number = 0
    while not pruner.finished:
        pruner.update()
        assert (pruner.probability[gone] == 1).all()
        gone = pruner.probability == 1
        step(network, pruner, optimizer, number)
        number += 1
        assert number < 400
    assert set(pruner.probability.tolist()) == {0.0, 1.0}
    assert {name: int(pruner.gone[pruner.slices[name]].sum()) for name in TARGETS} == TARGETS
    for number in range(500, 520):
        step(network, pruner, optimizer, number)
    for name in TARGETS:
        conv = network.get_submodule(name)
        zero = conv.weight.detach().flatten(1).eq(0).all(0)
        assert torch.equal(zero, pruner.probability[pruner.slices[name]] == 1)
        assert int(zero.sum()) == TARGETS[name]
        assert torch.equal(zero, optimizer.state[conv.weight]["momentum_buffer"].flatten(1).eq(0).all(0))
    updates = pruner.updates
    weights = pruner._weight.clone()
    pruner.update()  # of no effect but the count
    assert torch.equal(pruner._weight, weights)
    assert pruner.updates == updates + 1


def test_a_layer_that_finishes_early_waits_for_the_others() -> None:
    network = small()
    pruner = prune(network, {"one": 20, "two": 3})
    finish = {}
    while not pruner.finished:
        pruner.update()
        for name, target in pruner.plan.targets.items():
            if int(pruner.gone[pruner.slices[name]].sum()) == target:
                finish.setdefault(name, pruner.updates)
                assert set(pruner.probability[pruner.slices[name]].tolist()) == {0.0, 1.0}
    assert len(set(finish.values())) == 2


def test_channels_last_and_contiguous_weights_give_the_same() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = small().to(memory_format=memory_format)
        pruner = prune(network, interval=2)
        assert network.one.weight.is_contiguous(memory_format=memory_format)
        optimizer = sgd(network)
        pruner.attach(optimizer)
        for number in range(300):
            if number % 2 == 0 and not pruner.finished:
                pruner.update()
            step(network, pruner, optimizer, number)
        assert pruner.finished
        assert network.one.weight.is_contiguous(memory_format=memory_format)
        results.append((pruner.probability, {k: v.clone() for k, v in network.state_dict().items()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-5)


def test_masks_depend_on_the_seed_and_not_on_global_state() -> None:
    masks = []
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        torch.manual_seed(len(masks))
        _, pruner, _ = set_up(seed=seed)
        pruner.probability.fill_(0.5)
        pruner.mask()
        pruner.unmask()
        masks.append(pruner._mask.clone())
    torch.set_rng_state(state)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("interval", [1, 7])  # 7: saved in the middle of an interval, whose masks are drawn again
def test_a_saved_state_goes_on_bit_for_bit(interval: int) -> None:
    network, pruner, optimizer = set_up(interval=interval)
    for number in range(30):
        if number % interval == 0:
            pruner.update()
        step(network, pruner, optimizer, number)
    twin = copy.deepcopy(network)
    other = prune(twin, interval=interval, seed=99)
    other_optimizer = sgd(twin)
    saved = {name: value.clone() for name, value in pruner.state().items()}
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in network.parameters()]
    for parameter, buffer in zip(twin.parameters(), buffers, strict=True):
        other_optimizer.state[parameter]["momentum_buffer"] = buffer
    other.attach(other_optimizer)
    other.load_state(saved)
    assert other.updates == math.ceil(30 / interval)
    for number in range(30, 60):
        for net, masks, optim in ((network, pruner, optimizer), (twin, other, other_optimizer)):
            if number % interval == 0:
                masks.update()
            step(net, masks, optim, number)
        assert torch.equal(pruner._mask, other._mask)
    pairs = zip(network.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(pruner.probability, other.probability)
    assert torch.equal(torch.stack(pruner.trace), torch.stack(other.trace))


def test_after_an_interrupted_step_a_state_can_be_loaded() -> None:
    network, pruner, optimizer = set_up()
    pruner.probability.fill_(0.5)
    pruner.mask()  # the step ends here
    pruner.load_state(pruner.state())
    network.load_state_dict({name: torch.full_like(value, 0.5) for name, value in network.state_dict().items()})
    pruner.mask()
    pruner.unmask()
    assert network.one.weight.detach().eq(0.5).all()
    pruner.mask()
    pruner.attach(optimizer)  # as a resumed `fit` does
    assert network.one.weight.detach().eq(0.5).all()


def test_a_look_in_the_middle_of_a_step_leaves_what_was_shown() -> None:
    network, pruner, _ = set_up()
    pruner.probability.fill_(0.5)
    pruner.mask()
    shown = network.one.weight.detach().clone()
    assert shown.eq(0).any()
    with view(pruner, "unmasked"):
        assert network.one.weight.detach().ne(0).all()
    assert torch.equal(network.one.weight.detach(), shown)


def test_a_look_keeps_the_type_of_the_weights() -> None:
    network = small()
    plan = Plan(Groups(network, torch.zeros(1, 3, 5, 6), layers=[*TARGETS]), TARGETS)
    pruner = Pruner(network.to(torch.bfloat16), plan)
    pruner.probability.fill_(0.5)
    with view(pruner, "expected"):
        assert network.one.weight.dtype == torch.bfloat16


def convnet_pruner(**options: Any) -> Pruner:
    network = networks.create("convnet")
    return Pruner(network, Plan(Groups(network, torch.zeros(1, 3, 32, 32), layers=["conv1"]), {"conv1": 5}), **options)


@pytest.mark.parametrize(
    "other",
    [
        lambda: convnet_pruner(),
        lambda: set_up(interval=7)[1],  # as many groups, other settings
        lambda: prune(small(), {"one": 13, "two": 5}),  # another plan
        lambda: prune(small(), method="gradual"),
    ],
    ids=["network", "interval", "plan", "method"],
)
def test_the_state_of_another_pruner_is_refused(other: Callable[[], Pruner]) -> None:
    _, pruner, _ = set_up()
    state, before = other().state(), pruner.probability.clone()
    groups = len(state["probability"])
    with pytest.raises(
        ValueError, match=rf"of another plan or method \({groups} groups, this pruner 39\); use the one"
    ):
        pruner.load_state(state)
    with pytest.raises(ValueError, match="of another plan or method"):
        pruner.load_state({})
    assert torch.equal(pruner.probability, before)
    pruner.load_state(set_up()[1].state())


def test_a_frozen_layer_does_not_enter_the_optimisers_state() -> None:
    network = small()
    pruner = prune(network)
    network.one.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    pruner.before()
    network(torch.ones(2, 3, 5, 6)).sum().backward()
    pruner.after(optimizer)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == len([*network.parameters()]) - 1


def test_low_precision_weights_are_summed_in_float32() -> None:
    network = small()
    exact = network.one.weight.detach().to(torch.bfloat16).float().abs().sum(0).flatten()
    plan = Plan(Groups(network, torch.zeros(1, 3, 5, 6), layers=[*TARGETS]), TARGETS)
    pruner = Pruner(network.to(torch.bfloat16), plan)
    assert pruner.importance().dtype == torch.float32
    torch.testing.assert_close(pruner.importance()[:27], exact)


def test_the_table_counts_groups_that_came_back() -> None:
    _, pruner, _ = set_up()
    high, low = torch.full_like(pruner.probability, 0.6), torch.zeros_like(pruner.probability)
    low[0] = 0.55  # stays high: did not come back
    pruner.trace = [high, low]
    pruner.gone[pruner.slices["two"]] = True
    table = pruner.table()
    assert table.to_dict("list") == {
        "layer": ["one", "two"],
        "groups": [27, 12],
        "target": [14, 5],
        "pruned": [0, 12],
        "recovered": [26, 12],
    }


def test_bad_input_is_refused_and_the_network_left_alone() -> None:
    network = small()
    before = {name: (value.clone(), value.data_ptr()) for name, value in network.state_dict().items()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"interval": 0}, "interval=0 and rounds=150 must be at least 1"),
        ({"rounds": 0}, "interval=180 and rounds=0 must be at least 1"),
        ({"method": "magic"}, "method='magic' must be one of spp, oneshot"),
        ({"gradient": "none"}, "gradient='none' must be one of exact, unmasked"),
        ({"form": "other"}, "form='other' must be one of adaptive, literal"),
        ({"A": 2}, r"A=2 must lie in \(0, 1\]"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            prune(network, **options)
    network.two.weight.data[1, 2, 0, 1] = math.nan
    with pytest.raises(ValueError, match="weights of layer 'two' hold NaN or infinite values"):
        prune(network)
    network.two.weight.data.copy_(before["two.weight"][0])
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]


def test_weights_that_become_nan_stop_the_update_and_name_the_layer() -> None:
    network, pruner, _ = set_up()
    pruner.update()
    network.two.weight.data[0, 0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="layer 'two', noticed at step 180: weights are NaN or infinite"):
        pruner.update()
    assert pruner.updates == 1


def test_the_importance_is_of_unmasked_weights() -> None:
    network, pruner, _ = set_up()
    pruner.probability[:] = 0.5
    expected = spp.update(pruner.probability[:27].clone(), network.one.weight.detach().abs().sum(0).flatten(), 14)
    pruner.mask()
    pruner.unmask()
    pruner.update()
    assert torch.equal(pruner.probability[:27], expected)
