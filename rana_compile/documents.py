"""A JSON document and tensors in one safetensors file, with a checksum over both; read within bounds.

Nothing in such a file is code. Its header, which is parsed, has a limit; tensors are mapped, not copied.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rana_compile.files import replacing
from rana_compile.types import RanaError

MAX_HEADER = 1 << 24  # bytes; a plan of a thousand sites has half a million


def save(path: str | os.PathLike[str], key: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a document, under a key of the file's metadata, and tensors; an existing file stays intact until then.

    Raises WriteError; RanaError for a document that ``load`` would refuse.
    """
    from safetensors.torch import save_file

    text = json.dumps({**document, "checksum": checksum(document, tensors)}, sort_keys=True)
    with replacing(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {key: text})
        with temporary.open("rb") as file:
            size = _header_size(file)
        if size > MAX_HEADER:
            raise RanaError(f"{str(path)!r} would have a header of {size:,} bytes; at most {MAX_HEADER:,} are read")


def load(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors), not yet compared with the checksum: that of another format may be another.

    Raises OSError, or ValueError if the file is no such file.
    """
    from safetensors import SafetensorError, safe_open

    with Path(path).open("rb") as file:
        if (claimed := _header_size(file)) > MAX_HEADER:
            raise ValueError(f"its header claims {claimed:,} bytes, more than the {MAX_HEADER:,} that are read")
        try:  # by its number: by its name header and tensors may be of two files, if it is replaced meanwhile
            with safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
                text = (opened.metadata() or {}).get(key)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if text is None:
        raise ValueError(f"it has no {key!r} in its metadata")
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its document is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"its document is a {type(document).__name__}, not an object")
    if json.dumps(document, sort_keys=True) != text:  # such as a last digit that rounds to the same number
        raise ValueError("its document is not as it was written")
    return document, tensors


def check(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the document's checksum is that of what was read."""
    if document.get("checksum") != checksum(document, tensors):
        raise ValueError("its checksum differs: a part of it was changed")


def checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that the file holds, the checksum itself excepted."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}={weight_hash([tensors[name]])};".encode())
    return digest.hexdigest()


def weight_hash(weights: Sequence[Tensor]) -> str:
    """SHA-256 over dtype, shape and bytes of weights, in order."""
    digest = hashlib.sha256()
    for weight in weights:
        flat = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{weight.dtype}{tuple(weight.shape)}".encode())
        # not flat.numpy(): the storage of the model's own weight could never be resized again, as FSDP does
        digest.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()) if flat.nbytes else b"")
    return digest.hexdigest()


def _header_size(file: BinaryIO) -> int:
    return int.from_bytes(file.read(8), "little")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its document names a key twice")
    return found
