"""A network in one file: the same function again, without its class; and nothing that is read as code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from prune import to_onnx
from torch import Tensor, nn
from torch.nn import functional as F
from training import networks

from sppkit import cp, portable, state
from sppkit.compact import ColumnConv2d, SampledConv2d, compact


def columns() -> nn.Module:
    """The ConvNet without three quarters of conv2's columns."""
    torch.manual_seed(0)
    network = networks.create("convnet").eval()
    gone = torch.rand(32, 5, 5) < 0.75
    network.conv2.weight.data[:, gone] = 0
    small = compact(network)
    assert isinstance(small.conv2, ColumnConv2d)
    return small


def sampled() -> nn.Module:
    """ResNet-20 with half of its multiply-accumulates, channel samplers among them."""
    torch.manual_seed(0)
    small, _ = cp.channel_prune(networks.create("resnet20").eval(), torch.randn(30, 3, 32, 32), flop_ratio=2)
    assert any(isinstance(module, SampledConv2d) for module in small.modules())
    return small.eval()


class Padded(nn.Module):
    """Own parameters, a slice, keyword arguments, reflecting columns on one side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="reflect")
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.conv = ColumnConv2d(conv, torch.tensor([0, 3, 5, 17, 23]))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x[:, 1:, ::2], (0, 1), value=0.25) * self.scale + self.shift
        return torch.cat([self.conv(x).relu(), self.conv(x)], dim=1).mean((2, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: networks.create(name)) for name in ("convnet", "resnet20", "resnet56-projection")},
    **{
        name: (lambda name=name: getattr(torchvision.models, name)(num_classes=5))
        for name in ("resnet18", "mobilenet_v2", "squeezenet1_0", "shufflenet_v2_x0_5", "regnet_y_400mf")
    },
    "columns": columns,
    "sampled": sampled,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_loaded_computes_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = NETWORKS[name]().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    portable.save(network, tmp_path / "network.safetensors")
    again = portable.load(tmp_path / "network.safetensors")
    assert not again.training
    torch.testing.assert_close(again(x), network(x), rtol=1e-9, atol=1e-12)
    assert {k for k, _ in again.named_parameters()} == {k for k, _ in network.named_parameters()}


def test_parameters_slices_and_reflected_columns(tmp_path: Path) -> None:
    network, x = Padded().eval(), torch.randn(2, 5, 12, 7)
    portable.save(network, tmp_path / "network.safetensors")
    again = portable.load(tmp_path / "network.safetensors")
    torch.testing.assert_close(again(x), network(x))
    for kind in ("named_parameters", "named_buffers"):
        assert {name for name, _ in getattr(again, kind)()} == {name for name, _ in getattr(network, kind)()}


def test_a_loaded_network_trains_on_and_is_saved_again(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    portable.save(sampled(), one)
    network = portable.load(one).train()
    F.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    portable.save(network, two)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(portable.load(two)(x), network.eval()(x))


def test_no_class_of_ones_own_is_needed(tmp_path: Path) -> None:
    network, x = columns(), torch.ones(1, 3, 32, 32)
    portable.save(network, tmp_path / "network.safetensors")
    code = "import sys, torch; from sppkit import portable; network = portable.load(sys.argv[1])\n"
    code += "assert 'training' not in sys.modules; print(network(torch.ones(1, 3, 32, 32)).tolist())"
    command = [sys.executable, "-c", code, str(tmp_path / "network.safetensors")]
    root = Path(portable.__file__).parent.parent  # neither notebooks/ nor tests/ are on the path there
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    torch.testing.assert_close(torch.tensor(json.loads(found)), network(x), rtol=1e-4, atol=1e-6)


class Sorts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x)[0]


class Unsaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Sorts(), r"call_function .*sort.* \(node 'sort'\) cannot be written"),
        (Branches(), "Branches cannot be traced"),
        (Unsaved(), "tensor 'shift' is not in the state dict"),
        (nn.Sequential(nn.LSTM(3, 4)), "module '0', .*LSTM.*, cannot be made again"),
        (nn.Sequential(nn.Threshold(0.1, torch.ones(2))), r"tensor\(.* \(Tensor\) cannot be written"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_written_is_named(network: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        portable.save(network, tmp_path / "network.safetensors")
    assert not [*tmp_path.iterdir()]


def changed(about: dict[str, Any], what: str) -> None:
    """Spoil the description of a file."""
    nodes, modules = about["nodes"], about["modules"]
    first = next(node for node in nodes if node["op"] == "call_module")
    if what == "code in a module's name":
        name = '0"); print("owned'
        modules[name] = modules.pop(first["target"])
        first["target"] = name
    elif what == "code in a node's name":
        first["name"] = "x); print('owned'"
    elif what == "code in a keyword":
        first["kwargs"] = {"dict": {"x=print('owned'), y": 1}}
    elif what == "a method that is not listed":
        first |= {"op": "call_method", "target": "__class__"}
    elif what == "a function that is not listed":
        first |= {"op": "call_function", "target": "os.system"}
    elif what == "an unknown class":
        modules[first["target"]]["class"] = "Popen"
    elif what == "no class at all":
        modules[first["target"]]["class"] = "functional"
    elif what == "a node before it is made":
        first["args"] = {"tuple": [{"node": nodes[-1]["name"]}]}
    elif what == "another width":
        modules[first["target"]]["arguments"]["dict"]["out_channels"] = 7
    elif what == "an unknown operation":
        first["op"] = "run"
    elif what == "no nodes":
        del about["nodes"]
    elif what == "a tensor too few":
        about["read"] = {"weight": True}


SPOILT = [
    "code in a module's name",
    "code in a node's name",
    "code in a keyword",
    "a method that is not listed",
    "a function that is not listed",
    "an unknown class",
    "no class at all",
    "a node before it is made",
    "another width",
    "an unknown operation",
    "no nodes",
    "a tensor too few",
]


@pytest.mark.parametrize("what", SPOILT)
def test_an_unsound_description_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.safetensors"
    portable.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), path)
    tensors, about = state.load(path, kind=portable.KIND)
    changed(about, what)
    state.save(path, tensors, about)
    with pytest.raises(ValueError, match=r"network.safetensors' describes no network \(.*\); save it again"):
        portable.load(path)
    assert "owned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["0.__class__.half", "0.__class__.__base__.half", "0.half.extra", "0.T_destination.half"]
)
@pytest.mark.parametrize("kind", ["module", "tensor"])
def test_a_name_that_leads_into_a_class_is_refused_and_changes_nothing(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    portable.save(nn.Sequential(nn.ReLU()), path)
    _, about = state.load(path, kind=portable.KIND)
    module = kind == "module"
    node = {"name": "more", "op": "call_module" if module else "get_attr", "target": name}
    read = {"tuple": [{"node": about["nodes"][-2]["name"]}]} if module else {"tuple": []}
    about["nodes"].insert(-1, {**about["nodes"][-2], **node, "args": read})
    about["modules" if module else "read"][name] = dict(about["modules"]["0"]) if module else False
    state.save(path, {} if module else {name: torch.ones(1)}, about)
    before = {kind: dict(vars(kind)) for kind in (nn.Module, nn.ReLU)}
    with pytest.raises(ValueError, match=r"describes no network \(.*a node may not be 'more'"):
        portable.load(path)
    assert before == {kind: dict(vars(kind)) for kind in (nn.Module, nn.ReLU)}
    assert not hasattr(nn.Module.T_destination, "half")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    portable.save(nn.Sequential(nn.Conv2d(3, 8, 3)), path)
    tensors, about = state.load(path, kind=portable.KIND)
    state.save(path, {k: t for k, t in tensors.items() if not k.endswith("bias")}, about)
    with pytest.raises(ValueError, match=r"describes no network \(.*bias"):
        portable.load(path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(ValueError, match="cut short or damaged"):
        portable.load(path)
    path.write_bytes(data.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'))
    with pytest.raises(ValueError, match="schema 9"):
        portable.load(path)
    networks.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="kind 'network'"):
        portable.load(path)


@pytest.mark.parametrize("index", [torch.tensor([-1, 0]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0])])
def test_an_unsound_index_is_refused(index: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    portable.save(nn.Sequential(SampledConv2d(nn.Conv2d(4, 2, 1), torch.tensor([0, 2]))), path)
    tensors, about = state.load(path, kind=portable.KIND)
    state.save(path, tensors | {"0.index": index}, about)
    with pytest.raises(ValueError, match="needs an index"):
        portable.load(path)


@pytest.mark.parametrize("make", [columns, sampled])
def test_a_loaded_network_goes_to_torch_export(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    network, x = make(), torch.randn(2, 3, 32, 32)
    portable.save(network, tmp_path / "network.safetensors")
    program = torch.export.export(portable.load(tmp_path / "network.safetensors"), (x,))
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.parametrize("make", [columns, sampled, lambda: torchvision.models.resnet18(num_classes=5).eval()])
def test_onnx_computes_the_same_at_any_batch_size(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network, x = make(), torch.randn(3, 3, 32, 32)
    to_onnx(network, tmp_path / "network.onnx", x)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    expected = network(x).detach()
    for size in (1, 3):
        (found,) = session.run(None, {"images": x[:size].numpy()})
        assert (torch.from_numpy(found) - expected[:size]).abs().max() < 1e-4 * expected.abs().max()


def test_without_the_extra_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'sppkit\[export\]'"):
        to_onnx(nn.Conv2d(3, 2, 1), tmp_path / "network.onnx", torch.ones(1, 3, 2, 2))
