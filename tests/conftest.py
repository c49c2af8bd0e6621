"""What every test shares: one thread, no display, and tests skipped where their hardware or data is not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # small tensors: more threads are slower, and sums would depend on their number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cifar10 = ROOT / "data" / "cifar-10-batches-py"
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "cifar10": None if cifar10.is_dir() else "no data/cifar-10-batches-py",
    }
    for item in items:
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
