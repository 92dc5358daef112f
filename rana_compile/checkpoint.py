"""What a calibration has recorded so far, in a file, so that a killed one goes on where it stopped.

    record batch 1 → file;  record batch 2;  record batch 3 → file;  …;  fit;  the file is removed

The file belongs to the weights, the data and the settings (a hash of all of them); to others it is none.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rana_compile import documents
from rana_compile.data import Batch
from rana_compile.documents import weight_hash
from rana_compile.files import check_writable
from rana_compile.passes.record import Recorder
from rana_compile.statistics import Sample
from rana_compile.types import Site

log = logging.getLogger(__name__)

FORMAT = 2
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
        """Fill the recorder and the generator from the file. Returns how many batches it holds, 0 without a file.

        A damaged file, or one of other weights, data or settings, is as good as none, with a warning. Raises WriteError
        if none can be written there.
        """
        self._fingerprint = fingerprint
        check_writable(self._path)  # rather now than after the first minutes
        try:
            document, tensors = documents.load(self._path, _KEY)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            return self._refused(f"is not a readable recording ({error})")
        if document.get("format") != FORMAT or document.get("fingerprint") != fingerprint:
            return self._refused("belongs to other weights, data or settings")
        try:
            documents.check(document, tensors)
            samples, moments = _recorded(document, tensors)
            done = int(document["batches"])
            generator.set_state(tensors["generator"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            return self._refused(f"is not a readable recording ({error})")
        recorder.samples |= samples
        recorder.moments |= moments
        log.info("%s: %d batches were recorded before", self._path, done)
        return done

    def _refused(self, why: str) -> int:
        log.warning("%s %s: recording from the start", self._path, why)
        return 0

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
        sites, tensors = [], {"generator": generator.get_state()}
        for i, (site, sample) in enumerate(recorder.samples.items()):
            entry: dict[str, Any] = {"site": asdict(site), "sample": sample.settings()}
            parts = sample.tensors()
            if site in recorder.moments:
                moment, entry["moment_rows"] = recorder.moments[site]
                entry["device"] = str(moment.device)
                parts["moment"] = moment.cpu()
            tensors |= {f"{i}.{name}": t for name, t in parts.items()}
            sites.append(entry)
        document = {"format": FORMAT, "fingerprint": self._fingerprint, "batches": batches, "sites": sites}
        documents.save(self._path, _KEY, document, tensors)


def _recorded(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[Site, Sample], dict[Site, tuple[Tensor, int]]]:
    """Samples and moments of all sites in a file."""
    samples, moments = {}, {}
    for i, entry in enumerate(document["sites"]):
        site = Site.of(entry["site"])
        mine = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{i}.")}
        moment = mine.pop("moment", None)
        samples[site] = Sample.of(entry["sample"], mine)
        if moment is not None:
            moments[site] = moment.to(entry["device"]), int(entry["moment_rows"])
    return samples, moments


def fingerprint(parameters: Mapping[str, Tensor], batches: Sequence[Batch], settings: Iterable[Any]) -> str:
    """SHA-256 over names, values and dtypes of parameters and batches, and over the settings."""
    digest = hashlib.sha256(repr(list(settings)).encode())
    for values in (parameters, *batches):
        for name, value in values.items():
            digest.update(f"{name}={weight_hash([value])};".encode())
    return digest.hexdigest()
