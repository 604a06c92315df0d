"""Files: written completely or not at all, by one process at a time; found out when damaged."""

import fcntl
import json
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from train.config import UserError

MANIFEST = "manifest.json"


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and is on disk by then.

    A crash at any moment leaves no `target`, the old one, or the complete new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".partial-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        raise
    replaced = target.parent / f".replaced-{target.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file such that a crash leaves its old content or all of `text`."""
    temporary = path.with_name(f".partial-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder, and removes what a killed one left half-written.

    If this process is killed, the lock ends with it and with the processes that it forked, such as
    workers of a reward.

    Raises:
        UserError: another process has the lock, or the folder can't be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"output_dir: can't write to {str(output)!r}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"output_dir: {str(output)!r} is in use by {file.read() or 'another process'}, or "
                "by a process that it started; wait for their end, or choose another folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"output_dir: the file system of {str(output)!r} has no locks ({error.strerror}); "
                "don't start a second run there",
                stacklevel=3,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for path in (*output.glob(".partial-*"), *output.glob("*/.partial-*")):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        yield


def write_manifest(folder: Path) -> None:
    """Records the files of a folder.

    A CRC finds what a disk does to a file, and takes 0.3 s per GiB; a cryptographic hash would find
    forgery, too, and take two to five times as long. Loading reads the whole files anyway.
    """
    target = folder / MANIFEST
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != target)
    manifest = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}
    target.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> list[int]:
    """The size in bytes, and the CRC-32."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


class DamagedError(Exception):
    """A folder that is not what was written. The message says what is wrong with which file."""


def check_files(folder: Path, needed: Sequence[str]) -> None:
    """Checks that the files are those of the manifest, and that it lists those that are needed.

    Raises:
        DamagedError: they aren't.
        PermissionError: a file may not be read.
    """
    name = MANIFEST
    try:
        manifest = dict(json.loads((folder / name).read_text(encoding="utf-8")))
        for name in (*needed, *manifest):
            size, crc = manifest[name]
            found = _fingerprint(folder / name)
            if found[0] != size:
                raise DamagedError(f"{name} has {found[0]} bytes instead of {size}")
            if found[1] != crc:
                raise DamagedError(f"{name} has {size} bytes, but not those that were written")
    except PermissionError:
        raise  # that is no damage
    except FileNotFoundError as error:
        raise DamagedError(f"{name} is missing") from error
    except OSError as error:
        raise DamagedError(f"{name} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{MANIFEST} is no list of files") from error
