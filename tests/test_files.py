"""A file is there whole or not at all, whatever happens to the disk or to the process that writes it."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rana_compile import files
from rana_compile.files import check_writable, replacing
from rana_compile.types import RanaError, WriteError

KILLED = """
import os, signal, sys
from rana_compile.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def writer(path: Path, what: str) -> "subprocess.Popen[str]":
    """A process in the middle of a write: killed there, or waiting for the end of its input."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), what], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_others_may_read_what_the_umask_lets_them(mask: int, tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read, which a shared model directory cannot use."""
    path, before = tmp_path / "plan", os.umask(mask)
    try:
        for expected in (0o666 & ~mask, 0o640):
            with replacing(path) as temporary:
                temporary.touch(0o600)
            assert path.stat().st_mode & 0o777 == expected
            path.chmod(0o640)  # and a file that is replaced keeps what its owner chose
    finally:
        os.umask(before)


def test_a_killed_write_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, "old")
    with writer(path, "kill") as process:
        process.wait()
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "other", "new")
    assert len(list(tmp_path.iterdir())) == 3  # it is not the other's to remove
    write(path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "new", "other": "new"}


def test_errors_of_other_files_are_not_errors_of_the_write(tmp_path: Path) -> None:
    """Such as a compiler that cannot be started: freeing space would not help."""
    path = tmp_path / "new" / "file"
    with pytest.raises(FileNotFoundError, match="no-such-program"), replacing(path):
        subprocess.run(["/no-such-program"], check=True)
    with pytest.raises(WriteError, match="cannot write"), replacing(path) as temporary:
        temporary.with_name("directory").joinpath("missing").write_text("")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["taken", "new/../taken", "./taken"])
def test_a_relative_place_that_cannot_be_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on temporary directories have absolute names, whatever they were asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "by").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        write(Path(name), "text")
    with pytest.raises(WriteError, match="cannot write"):
        raise_inside(Path(name), PermissionError(13, "no", str(tmp_path / f".{Path(name).name}.x.tmp" / "file")))
    with pytest.raises(FileNotFoundError):
        raise_inside(Path(name), FileNotFoundError(2, "no such program", "gcc"))


def raise_inside(path: Path, error: OSError) -> None:
    with replacing(path):
        raise error


def test_a_write_in_progress_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writer(path, "wait") as process:
        write(path, "mine")
        assert path.read_text() == "mine"
        process.communicate("", timeout=60)
    assert process.returncode == 0
    assert path.read_text() == "half"  # its own, and whole: it ended last
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 4096 bytes: as a full disk, but for the number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path, small_disk: None) -> None:
    write(tmp_path / "file", "old")
    with pytest.raises(WriteError, match=r"cannot write '.*file': File too large; what was there before is untouched"):
        write(tmp_path / "file", "x" * 10_000)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize("place", ["/proc/none/file", "{tmp}/file/below"])
def test_a_place_that_cannot_be_written_is_named_beforehand(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*choose a place that can be written"):
        check_writable(place.format(tmp=tmp_path))


def test_asking_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_directory_that_was_taken_for_abandoned_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another write of the same file begins between making it and locking it: removed, or held to be removed."""
    made: list[Path] = []
    held: list[int] = []
    mkdtemp = files.tempfile.mkdtemp

    def disturbed(**settings: Any) -> str:
        made.append(Path(mkdtemp(**settings)))
        if len(made) == 1:
            made[0].rmdir()
        if len(made) == 2:
            held.append(os.open(made[1], os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return str(made[-1])

    monkeypatch.setattr(files.tempfile, "mkdtemp", disturbed)
    write(tmp_path / "file", "new")
    os.close(held[0])
    assert len(made) == 3 and (tmp_path / "file").read_text() == "new"


def test_errors_of_the_block_itself_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RanaError("mine"), ValueError("yours"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(tmp_path / "file"):
            raise error
    with pytest.raises(OSError, match="gone"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "while another holds the lock"])
def test_a_directory_that_another_process_clears_up_is_made_anew(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock a directory looks abandoned to others."""
    taken: list[Path] = []

    def take(directory: str) -> None:
        if not taken:
            taken.append(Path(directory))
            Path(directory).rmdir()

    made, opened, locked = tempfile.mkdtemp, os.open, fcntl.flock

    def mkdtemp(**options: Any) -> str:
        directory = made(**options)
        if when == "before it is opened":
            take(directory)
        return directory

    def open_(path: Any, flags: int, *rest: Any) -> int:
        descriptor = opened(path, flags, *rest)
        if when == "before it is locked" and str(path).endswith(".tmp"):
            take(path)
        return descriptor

    def flock(descriptor: int, how: int) -> None:
        if when == "while another holds the lock" and not taken:
            taken.append(tmp_path)
            raise BlockingIOError
        locked(descriptor, how)

    monkeypatch.setattr("rana_compile.files.tempfile.mkdtemp", mkdtemp)
    monkeypatch.setattr("rana_compile.files.os.open", open_)
    monkeypatch.setattr("rana_compile.files.fcntl.flock", flock)
    write(tmp_path / "file", "new")
    assert taken and (tmp_path / "file").read_text() == "new"


def test_without_locks_writes_go_on_and_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("rana_compile.files.fcntl.flock", unsupported)
    (tmp_path / ".file.abc.tmp").mkdir()
    write(tmp_path / "file", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".file.abc.tmp", "file"]
