"""Files that appear whole or not at all."""

import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rana_compile.types import RanaError, WriteError


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes ``target`` when the block ends, and is removed if the block fails.

    An existing target stays intact until then. Missing directories are made. What killed processes left of earlier
    writes of the same file is removed. Raises WriteError where the disk is full, or the place cannot be written.
    """
    path = Path(target)
    with _explained(path), _directory_beside(path) as directory:
        temporary = directory / path.name
        yield temporary
        temporary.chmod(_mode(path, directory))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _mode(path: Path, directory: Path) -> int:
    """Permissions of the file before, else those that new files get here (safetensors writes for the owner alone)."""
    if not path.exists():
        path = directory / "permissions"
        path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def check_writable(target: str | os.PathLike[str], room: int = 4096) -> None:
    """Raises WriteError unless a file of ``room`` bytes can be made there: to be asked before the work, not after."""
    path = Path(target)
    with _explained(path), _directory_beside(path) as directory:
        (directory / path.name).write_bytes(bytes(room))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except RanaError:
        raise
    except (OSError, SafetensorError) as error:
        if _is_elsewhere(getattr(error, "filename", None), path.parent):  # something else that the block does
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(
            f"cannot write {str(path)!r}: {reason}; what was there before is untouched. Free space on its disk, or "
            "choose a place that can be written"
        ) from error


def _is_elsewhere(name: object, directory: Path) -> bool:
    """Whether an error's file is neither in the directory nor a directory above it; one without a name may be.

    A name without a directory is that of a program, or of a directory to make.
    """
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    file, place = Path(os.path.abspath(os.fsdecode(name))), Path(os.path.abspath(directory))
    inside = bool(os.path.dirname(os.fsdecode(name))) and file.is_relative_to(place)
    return not inside and not place.is_relative_to(file)


@contextmanager
def _directory_beside(path: Path) -> Iterator[Path]:
    """A directory for one write, locked while its process lives, so that others know whether it is still needed.

    A directory, since compilers and libraries replace the file itself, and with it a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    directory, lock = _locked_directory(path)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked_directory(path: Path) -> tuple[Path, int]:
    """A new one. Before it is locked another process may take it for abandoned: then there is a next."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if _lock(lock) is not False and directory.exists():
            return directory, lock
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent, include_hidden=True):
        try:
            lock = os.open(path.parent / name, os.O_RDONLY)
        except OSError:  # gone by now, or another user's
            continue
        if _lock(lock):
            shutil.rmtree(path.parent / name, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Whether this process holds the lock now; False if another does, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
