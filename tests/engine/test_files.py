"""atomic_write: the old content or the new, and no temporary file left, whatever happens."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fwdllm.engine import files
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import (
    atomic_write,
    check_destination,
    check_still_there,
    identity,
    lock,
    temporary_folder,
    write_private,
)


def test_success_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["adapter.gguf"]


def test_temporary_is_hidden_and_in_the_same_folder(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "a.bin") as temporary:
            temporary.touch()
            names.add(temporary.name)
    assert temporary.parent == tmp_path
    assert len(names) == 2
    assert all(name.startswith(".a.bin.tmp") and str(os.getpid()) in name for name in names)


def write_half(path: Path, failure: type[BaseException]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise failure


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_failure_keeps_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"old")
    with pytest.raises(failure):
        write_half(path, failure)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["adapter.gguf"]


def test_failure_before_the_temporary_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), atomic_write(tmp_path / "a"):
        raise ValueError("early")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space") as caught, atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        steps.append("fsync")
        fsync(descriptor)

    def recorded_replace(source: Path, destination: Path) -> None:
        steps.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
    assert steps == ["fsync", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such call")
def test_a_private_file_is_on_disk_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written next may count on it, a power cut notwithstanding."""
    steps = []
    replace = os.replace

    def recorded_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def recorded_replace(source: Path, destination: Path) -> None:
        steps.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_private(tmp_path / "key", b"secret")
    assert steps == ["file", "replace", "folder"]
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    script = f"""if True:
        import sys
        from fwdllm.engine.files import atomic_write
        with atomic_write({str(path)!r}) as new:
            new.write_text("half")
            print(flush=True)
            sys.stdin.read()"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    process.stdout.readline()
    [left] = tmp_path.iterdir()
    left.with_name(f"{left.name}-journal").touch()  # as SQLite keeps one beside a database
    mine = [
        tmp_path / name for name in (".adapter.gguf.tmp", ".adapter.gguf.tmp1-notours", ".b.tmp")
    ]
    for user_file in mine:
        user_file.touch()
    os.utime(left, (0, 0))
    check_destination(path)
    assert left.exists()  # its process lives
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    check_destination(path)
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_folders_that_killed_processes_left_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, living, other = (tmp_path / f"fwdllm-{name}" for name in ("dead", "living", "other"))
    for folder in (dead, living, other):
        folder.mkdir()
        (folder / "adapter.gguf").touch()
    held = lock(living / "lock")
    lock(dead / "lock").close()
    for folder in (dead, living):
        os.utime(folder / "lock", (0, 0))
    files._remove_folders.cache_clear()
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
        assert sorted(tmp_path.iterdir()) == sorted([folder, living, other])
    held.close()
    assert sorted(tmp_path.iterdir()) == sorted([living, other])


def test_a_file_that_is_read_only_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    for attempt in (lambda: check_destination(path), lambda: atomic_write(path).__enter__()):
        with pytest.raises(ConfigError, match="it is read-only"):
            attempt()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_that_is_read_only_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    check_destination(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("builtins.open", refuse)  # root may write to any folder
    with pytest.raises(ConfigError, match="Read-only file system"):
        check_destination(tmp_path / "a")


def test_a_file_is_the_same_while_it_is_held(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock")
    known = identity(tmp_path / "lock")
    check_still_there(tmp_path / "lock", known)
    (tmp_path / "lock").unlink()
    with pytest.raises(ConfigError, match="was deleted or replaced"):
        check_still_there(tmp_path / "lock", known)
    other = lock(tmp_path / "lock")  # another run's
    with pytest.raises(ConfigError, match="was deleted or replaced"):
        check_still_there(tmp_path / "lock", known)
    held.close()
    other.close()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        atomic_write(tmp_path / "nowhere" / "a").__enter__()


def test_destination_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        atomic_write(tmp_path).__enter__()


def test_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".gguf")  # 245 bytes of the 255 a name may have
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
