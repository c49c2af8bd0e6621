"""Files of tensors and text that are never half written and never a pickle.

A file of tensors is in the safetensors format, its metadata one JSON object: `{"schema": 1, "kind": ...}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor, nn

SCHEMA = 1


def save(path: str | Path, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write `tensors` and a JSON-able `description`, which must name its "kind"."""
    if not isinstance(description.get("kind"), str):
        raise ValueError(f'description={description!r} must have a "kind", such as {{"kind": "network"}}')
    # Cloned, because safetensors refuses tensors that share memory, as tied weights and views do.
    own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    text = json.dumps({**description, "schema": SCHEMA})
    write_bytes(path, format_safetensors(own, metadata={"sppkit": text}))


def load(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the description of a file that `save` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another format (a pickle is refused
    unread), of another kind, or written by a newer sppkit.
    """
    quoted = repr(str(path))
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {quoted}; give the path of a saved {kind}, or make it first"
        )
    data = Path(path).read_bytes()
    if data[8:9] not in (b"{", b""):  # eight bytes of header length, then the header, a JSON object
        raise ValueError(f"{quoted} is not a safetensors file (a pickle is never read: it can run code)")
    try:
        tensors = dict(sorted(parse_safetensors(data).items()))  # it gives them in any order
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = json.loads(header.get("__metadata__", {}).get("sppkit", "{}"))
    except (SafetensorError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        size = f"{len(data)} bytes"
        raise ValueError(f"{quoted} is cut short or damaged ({size}: {error}); make it again") from error
    schema = description.get("schema") if isinstance(description, dict) else None
    if not isinstance(schema, int):
        raise ValueError(f"{quoted} was not written by sppkit; save its tensors with sppkit.state.save")
    if schema > SCHEMA:
        raise ValueError(f"{quoted} has schema {schema}, newer than {SCHEMA}; install a newer sppkit")
    if description.get("kind") != kind:
        raise ValueError(f"{quoted} is of kind {description.get('kind')!r}; give a file of kind {kind!r}")
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


def write_text(path: str | Path, text: str) -> None:
    """Write or replace a UTF-8 text file whole."""
    write_bytes(path, text.encode())


def append_line(path: str | Path, line: str) -> None:
    """Append one line, flushed to the disk; a last line that was cut short is ended first."""
    if "\n" in line:
        raise ValueError(f"line={line!r} must not hold a newline; append its lines one by one")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError naming the first of `tensors` that holds NaN or an infinity; `what` is whose."""
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            found = f"{what}: {name!r} holds {bad} NaN or infinite of {tensor.numel()} values"
            raise ValueError(f"{found}; go back to an earlier checkpoint, or lower the learning rate")


def save_network(network: nn.Module, path: str | Path, /, **description: Any) -> None:
    """Save the state dict of `network`; `description` says what a reader needs to build the same one."""
    save(path, network.state_dict(), {**description, "kind": "network"})


def load_network(network: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a state dict into `network`, in place, and return the description.

    Raises what `load` raises, and ValueError, changing nothing, if names or shapes are not those of `network`.
    """
    tensors, description = load(path, kind="network")
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if different := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name, (there, here) = different[0], (shapes.get(different[0], "absent") for shapes in (theirs, ours))
        raise ValueError(
            f"{str(path)!r} is of another network: {name!r} is {there} in the file and {here} in the network "
            f"({len(different)} names differ); build the network of the file's description, {description}"
        )
    network.load_state_dict(tensors)
    return description


def network_id(network: nn.Module) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the state dict: names in order, each with its raw bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
