"""What is read back is what was written, and a file that is not so is refused before it costs memory."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rana_compile import RanaError, documents


def raw(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def header(**tensors: Any) -> bytes:
    document = json.dumps({"a": 1, "checksum": ""})
    return json.dumps({"__metadata__": {"key": document}, **tensors}).encode()


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4).t(), "none": torch.zeros(0, 3), "half": torch.randn(2).half()}
    documents.save(tmp_path / "file", "key", {"a": [1, "b"]}, tensors)
    document, read = documents.load(tmp_path / "file", "key")
    documents.check(document, read)
    assert document["a"] == [1, "b"] and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    read["x"][0, 0] += 1
    with pytest.raises(ValueError, match="checksum differs"):
        documents.check(document, read)


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("file", 3), ("new", 5)):
        documents.save(tmp_path / name, "key", {"size": size}, {"x": torch.full((size,), float(size))})
    from_file = torch.UntypedStorage.from_file

    def replaced(*args: Any, **kwargs: Any) -> Any:  # safetensors has read the header, and opens the file again
        (tmp_path / "new").rename(tmp_path / "file")
        return from_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", replaced)
        document, tensors = documents.load(tmp_path / "file", "key")
    documents.check(document, tensors)
    assert document["size"] == len(tensors["x"]) == 3
    assert documents.load(tmp_path / "file", "key")[0]["size"] == 5


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (header(x=tensor([1 << 40], 0, 1 << 42)), b""),  # beyond the end of the file
        (header(x=tensor([1 << 62, 1 << 62], 0, 4)), bytes(4)),  # a size that overflows
        (header(x=tensor([-1], 0, 4)), bytes(4)),
        (header(x=tensor([1], 0, -4)), bytes(4)),
        (header(x=tensor([1], 0, 4), y=tensor([1], 0, 4)), bytes(4)),  # overlapping
        (header(x=tensor([1], 0, 4), y=tensor([1], 8, 12)), bytes(12)),  # with a hole
        (header(x=tensor([1], 0, 4, "Q3")), bytes(4)),
        (header(x=tensor([2], 0, 4)), bytes(4)),  # shape and bytes disagree
        (header(x=tensor([1], 0, 4)), bytes(9)),  # more behind it
        (b"[" * 100_000, b""),
        (b"\xff" * 64, b""),
    ],
    ids=["beyond", "overflow", "negative", "backwards", "overlap", "hole", "dtype", "shape", "more", "deep", "bytes"],
)
def test_hostile_headers_are_refused(tmp_path: Path, head: bytes, body: bytes) -> None:
    with pytest.raises(ValueError):
        documents.load(raw(tmp_path / "file", head, body), "key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("[]", "a list, not an object"),
        ('{"a": 1, "a": 2}', "names a key twice"),
        ('{"b": {"a": 1, "a": 2}}', "names a key twice"),
        ('{"a": ' + "1" * 10_000 + "}", "integer"),
        ("{", "Expecting"),
        ('{"a": 0.33436670899391175}', "not as it was written"),  # a bit flipped, and still the same number
    ],
    ids=lambda value: value[:12],
)
def test_hostile_documents_are_refused(tmp_path: Path, text: str, message: str) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "file"), {"key": text})
    with pytest.raises(ValueError, match=message):
        documents.load(tmp_path / "file", "key")


def test_a_file_of_others_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "file"), {"format": "pt"})
    with pytest.raises(ValueError, match="no 'key' in its metadata"):
        documents.load(tmp_path / "file", "key")


@pytest.mark.parametrize("claimed", [documents.MAX_HEADER + 1, 1 << 40, (1 << 64) - 1])
def test_a_long_header_is_not_parsed(tmp_path: Path, claimed: int) -> None:
    """Behind the first eight bytes there is room for all of it, on a disk that keeps no zeros."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(min(claimed + 8, 1 << 40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="more than the 16,777,216 that are read"):
        documents.load(path, "key")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15  # KiB


def test_what_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(documents, "MAX_HEADER", 1000)
    tensors: dict[str, Tensor] = {"x": torch.zeros(1)}
    with pytest.raises(RanaError, match="at most 1,000 are read"):
        documents.save(tmp_path / "file", "key", {"a": "b" * 1000}, tensors)
    assert (tmp_path / "file").read_text() == "old"
