"""Files that are never half written and never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import driver
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn
from training import networks

from sppkit import state


def network(width: int = 4) -> nn.Sequential:
    generator = torch.Generator().manual_seed(width)
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 100)
    return net


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_what_was_saved_is_loaded_and_other_programs_can_read_it(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "strided": base.t(),
        "tied": base,
        "flag": torch.tensor(True),
        "count": torch.tensor(7),
        "half": torch.tensor([1.5, -2]).bfloat16(),
        "none": torch.zeros(0, 3),
        "leaf": torch.ones(2, requires_grad=True),
    }
    path = tmp_path / "new folder" / "a.safetensors"
    state.save(path, tensors, {"kind": "test", "ratio": 0.5, "names": ["a", "b"]})
    loaded, description = state.load(path, kind="test")
    assert description == {"schema": 1, "kind": "test", "ratio": 0.5, "names": ["a", "b"]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    del tensors["half"]  # NumPy has no bfloat16
    state.save(path, tensors, {"kind": "test"})
    assert np.array_equal(safetensors.numpy.load_file(path)["strided"], base.numpy().T)


def test_a_missing_file_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent'; give the path of a saved network"):
        state.load(tmp_path / "absent", kind="network")


def test_another_kind_schema_or_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    state.save(path, {"x": torch.ones(2)}, {"kind": "figure"})
    with pytest.raises(ValueError, match="of kind 'figure' and schema 1, not 'network' and 1; give another file"):
        state.load(path, kind="network")
    monkeypatch.setattr(state, "SCHEMA", 2)
    state.save(path, {"x": torch.ones(2)}, {"kind": "network", "schema": 1})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"schema 2, not 'network' and 1; .*install the sppkit that wrote it"):
        state.load(path, kind="network")
    for metadata, found in (
        (None, "of kind None and schema None"),
        ({"sppkit": "[1]"}, "damaged"),
        ({"sppkit": '{"schema": "1", "kind": "network"}'}, "of kind 'network' and schema '1'"),
    ):
        safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=found):
            state.load(path, kind="network")


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state.save(path, {"x": torch.arange(4.0), "y": torch.ones(3)}, {"kind": "test"})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"cut short or damaged \({end} bytes"):
            state.load(path, kind="test")
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        state.load(path, kind="test")


def test_a_damaged_header_gives_no_other_error_than_value_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state.save(path, {"x": torch.arange(4.0)}, {"kind": "test"})
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole) - 16):
        for value in (0, 0x22, 0x7B, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                state.load(path, kind="test")
            except ValueError:
                refused += 1
    assert refused > len(whole)
    deep = json.dumps({"__metadata__": {"sppkit": "[" * 100_000}}).encode()
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ValueError, match="damaged"):
        state.load(path, kind="test")


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path, write: Callable[[object, object], None]) -> None:
    mark, path = tmp_path / "mark", tmp_path / "network.pt"
    with path.open("wb") as file:
        write({"weight": Hostile(mark)}, file)
    with pytest.raises(ValueError, match=r"not a safetensors file.*pickle.*never read"):
        networks.load(network(), path)
    assert not mark.exists()
    if write is pickle.dump:  # the trap works: whoever unpickles the file springs it
        pickle.loads(path.read_bytes())["weight"].close()
        assert mark.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "a.safetensors"
    state.save(path, {"x": torch.zeros(3)}, {"kind": "test"})
    old = path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        state.save(path, {"x": torch.ones(3)}, {"kind": "test"})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state.save(path, {"x": torch.zeros(3)}, {"kind": "test"})
    script = """
import builtins, sys, time, torch
from sppkit import state
real = builtins.open
def slow(*args, **kwargs):
    file = real(*args, **kwargs)
    def write(data, whole=file.write):
        whole(data[: len(data) // 2])
        file.flush()
        print("half", flush=True)
        time.sleep(60)
    class Slow:
        def __enter__(self): return self
        def __exit__(self, *_): file.close()
        def __getattr__(self, name): return getattr(file, name)
    made = Slow()
    made.write = write
    return made
state.open = slow
state.save(sys.argv[1], {"x": torch.ones(3)}, {"kind": "test"})
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"half"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) == 1
    assert left[0].stat().st_size > 0  # the kill did come in mid-write
    assert torch.equal(state.load(path, kind="test")[0]["x"], torch.zeros(3))
    state.save(path, {"x": torch.ones(3)}, {"kind": "test"})  # and what it left is in nobody's way
    assert torch.equal(state.load(path, kind="test")[0]["x"], torch.ones(3))


def test_write_bytes_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.md"
    state.write_bytes(path, b"a long first text")
    state.write_bytes(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(path.parent.iterdir()) == [path]


def test_append_line_ends_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    driver.append_line(path, "one")
    driver.append_line(path, "two é")
    assert path.read_bytes() == "one\ntwo é\n".encode()
    path.write_bytes(b'one\n{"st')
    driver.append_line(path, "three")
    assert path.read_text() == 'one\n{"st\nthree\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_append_line_fails_when_the_disk_is_full() -> None:
    with pytest.raises(OSError, match="No space left"):
        driver.append_line(Path("/dev/full"), "line")


def test_a_network_goes_to_a_file_and_back(tmp_path: Path) -> None:
    path, one, two = tmp_path / "a.safetensors", network(), network()
    with torch.no_grad():
        two.state_dict()["0.weight"][0, 0, 0, 0] += 1
    assert driver.network_id(one) != driver.network_id(two)
    networks.save(one, path, model="small", width=4)
    assert networks.load(two, path) == {"schema": 1, "kind": "network", "model": "small", "width": 4}
    assert driver.network_id(one) == driver.network_id(two)
    assert len(driver.network_id(one)) == 12


def test_the_network_id_is_a_plain_sha256() -> None:
    net = nn.Linear(2, 1)
    net.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    # printf 'bias\0\0\x40\x40weight\0\0\x80\x3f\0\0\0\x40' | sha256sum
    assert driver.network_id(net) == "929c27949683"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(5), r"another network: '0.weight' is \(5, 3, 3, 3\) in the file and \(4, 3, 3, 3\).*\(7 names"),
        (nn.Linear(2, 2), r"'0.weight' is absent in the file and \(4, 3, 3, 3\) in the network"),
        (nn.Sequential(*network(), nn.Linear(2, 2)), r"'4.bias' is \(2,\) in the file and absent .*\(2 na"),
    ],
    ids=["width", "names", "extra"],
)
def test_a_checkpoint_of_another_network_changes_nothing(tmp_path: Path, other: nn.Module, message: str) -> None:
    path, net = tmp_path / "a.safetensors", network()
    before = driver.network_id(net)
    networks.save(other, path, model="other")
    with pytest.raises(ValueError, match=message):
        networks.load(net, path)
    assert driver.network_id(net) == before
