"""What every test shares: one thread, no display, and tests skipped where their hardware or data is not."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# What is around the package: commands, experiments, notebooks. Their tests start processes and train networks
PROGRAMS = ("bench_channels", "bench_runs", "bench_speed", "channels", "cli", "driver", "figures", "notebooks")
PROGRAMS += ("packaging", "prune", "single", "variants")

torch.set_num_threads(1)  # small tensors: more threads are slower, and sums would depend on their number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cifar10 = ROOT / "data" / "cifar-10-batches-py"
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "cifar10": None if cifar10.is_dir() else "no data/cifar-10-batches-py",
    }
    for item in items:
        if item.path.stem.removeprefix("test_") in PROGRAMS:
            item.add_marker(pytest.mark.program)
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tmp_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory for one test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], ModuleType]:
    """Another copy of a module, whose Triton kernels the interpreter runs on a CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined

    def copy(module: ModuleType) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"interpreted_{module.__name__}", str(module.__file__))
        assert spec
        assert spec.loader
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        return again

    return copy


@pytest.fixture
def kernels(interpret: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`sppkit.kernels` for a CPU, by the interpreter, in programs of few places; whatever imports it now gets this."""
    import sppkit.kernels

    made = interpret(sppkit.kernels)
    made.DEVICES = ("cpu",)
    made.TILES |= {"PLACES": 64, "COUNT": 5}
    made.FUSED, made.BUSY = ((64, 128, 32), (64, 16, 64)), 2
    monkeypatch.setitem(sys.modules, "sppkit.kernels", made)
    monkeypatch.setattr(sppkit, "kernels", made)
    return made


@pytest.fixture
def ptx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Compiles a Triton kernel for a Hopper GPU, which takes none, and gives the assembly."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], sixteen: Iterable[str] = ()) -> str:
        """constants may name what the kernel does not have; pointers and `sixteen` numbers are multiples of 16."""
        names = kernel.arg_names
        kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        place = {name: (number,) for number, name in enumerate(names)}
        source = compiler.ASTSource(
            kernel, kinds, constexprs={place[name]: value for name, value in constants.items() if name in place},
            attrs={place[name]: [["tt.divisibility", 16]] for name in names
                   if name in sixteen or kinds[name].startswith("*")},
        )  # fmt: skip
        options = {name: value for name, value in constants.items() if name in ("num_warps", "num_stages", "maxnreg")}
        return str(compiler.compile(source, target=target, options=options).asm["ptx"])

    return compiled
