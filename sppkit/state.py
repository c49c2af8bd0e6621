"""Files of tensors with a description, never half written and never a pickle."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

SCHEMA = 1


def save(path: str | Path, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write copies of `tensors`, which may share memory, and a JSON-able `description`, which must name its "kind"."""
    own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    write_bytes(path, safetensors.torch.save(own, metadata={"sppkit": json.dumps({**description, "schema": SCHEMA})}))


def load(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and description of a file of `save`; FileNotFoundError, ValueError if damaged or another."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; give the path of a saved {kind}")
    data = path.read_bytes()
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # it gives them in any order
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = dict(json.loads(header.get("__metadata__", {}).get("sppkit", "{}")))
    except Exception as error:  # the parsers raise many kinds of exception on a damaged header
        found = f"cut short or damaged ({len(data)} bytes: {error}), or not a safetensors file (a pickle is never read)"
        raise ValueError(f"{str(path)!r} is {found}; make it again") from error
    found = f"kind {description.get('kind')!r} and schema {description.get('schema')!r}"
    if found != f"kind {kind!r} and schema {SCHEMA}":
        wanted = f"not {kind!r} and {SCHEMA}; give another file, or install the sppkit that wrote it"
        raise ValueError(f"{str(path)!r} is of {found}, {wanted}")
    return tensors, description


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write or replace a file whole, by way of a temporary file in its folder, which is made if absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two writers never share one
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
