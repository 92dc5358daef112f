"""What a calibration has recorded so far, in a file, so that a killed one goes on where it stopped.

    record batch 1 → file;  record batch 2;  record batch 3 → file;  …;  fit;  the file is removed

The file belongs to the weights, the data and the settings (a hash of all of them); to others it is none.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rana_compile.data import Batch
from rana_compile.files import replacing
from rana_compile.passes.record import Recorder
from rana_compile.plan import weight_hash
from rana_compile.statistics import Sample
from rana_compile.types import Site

log = logging.getLogger(__name__)

FORMAT = 1
_KEY = "rana_compile_recording"
PATIENCE = 10.0  # a write may take the tenth part of the time since the last one


class Checkpoint:
    """The file of one calibration.

    Args:
        path: where it lies; written to a temporary name and renamed.
        every: least seconds between two writes.
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 15.0) -> None:
        self._path = Path(path)
        self._every = every
        self._fingerprint = ""
        self._due = time.monotonic() + every

    def restore(self, fingerprint: str, recorder: Recorder, generator: torch.Generator) -> int:
        """Fill the recorder and the generator from the file. Returns how many batches it holds, 0 without a file."""
        self._fingerprint = fingerprint
        try:
            document, tensors = _read(self._path)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is not a readable recording (%s): recording from the start", self._path, error)
            return 0
        if document.get("format") != FORMAT or document.get("fingerprint") != fingerprint:
            log.warning("%s belongs to other weights, data or settings: recording from the start", self._path)
            return 0
        for i, entry in enumerate(document["sites"]):
            site = Site.of(entry["site"])
            mine = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{i}.")}
            moment = mine.pop("moment", None)
            recorder.samples[site] = Sample.of(entry["sample"], mine)
            if moment is not None:
                device = entry["device"]
                recorder.moments[site] = (moment.to(device), entry["moment_rows"])
        generator.set_state(tensors["generator"])
        done: int = document["batches"]
        log.info("%s: %d batches were recorded before", self._path, done)
        return done

    def keep(self, batches: int, recorder: Recorder, generator: torch.Generator, last: bool = False) -> None:
        """Write what was recorded of the first ``batches``, if it is time or these were the last."""
        if not last and time.monotonic() < self._due:
            return
        begin = time.monotonic()
        self._write(batches, recorder, generator)
        took = time.monotonic() - begin
        self._due = time.monotonic() + max(self._every, PATIENCE * took)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self, batches: int, recorder: Recorder, generator: torch.Generator) -> None:
        from safetensors.torch import save_file

        sites, tensors = [], {"generator": generator.get_state()}
        for i, (site, sample) in enumerate(recorder.samples.items()):
            entry: dict[str, Any] = {"site": asdict(site), "sample": sample.settings()}
            parts = sample.tensors()
            if site in recorder.moments:
                moment, entry["moment_rows"] = recorder.moments[site]
                entry["device"] = str(moment.device)
                parts["moment"] = moment.cpu()
            tensors |= {f"{i}.{name}": t.contiguous() for name, t in parts.items()}
            sites.append(entry)
        document = {"format": FORMAT, "fingerprint": self._fingerprint, "batches": batches, "sites": sites}
        with replacing(self._path) as temporary:
            save_file(tensors, temporary, {_KEY: json.dumps(document)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            document = json.loads((file.metadata() or {})[_KEY])
            return document, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def fingerprint(parameters: Mapping[str, Tensor], batches: Sequence[Batch], settings: Iterable[Any]) -> str:
    """SHA-256 over names, values and dtypes of parameters and batches, and over the settings."""
    digest = hashlib.sha256(repr(list(settings)).encode())
    for values in (parameters, *batches):
        for name, value in values.items():
            digest.update(f"{name}={weight_hash([value])};".encode())
    return digest.hexdigest()
