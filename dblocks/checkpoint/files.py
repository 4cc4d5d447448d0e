"""Atomic writes of a file, and of several files as one unit.

A save writes all its files to a separate folder `.saving-*` inside the target. One rename to
`.saved` makes the save valid: from then on readers look there first (`current`), while the files
are moved to their places one by one. If the writer dies before the rename, the earlier save
remains; if it dies later, the new save is valid, and the next one finishes the moves. Files of two
writers never mix: the second writer first finishes the moves of the first. Nor do files of two
saves mix for a reader, who reads them again if a save has replaced one meanwhile (`unchanged`).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import socket
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

SAVING, SAVED = ".saving-", ".saved"
DEAD_AFTER = 24 * 3600  # seconds, for folders left by a writer on another machine
LONGEST_REASON = 300  # characters of an error message; PyTorch lists every tensor
UMASK = threading.Lock()
TRIES = 100  # attempts to rename, while other writers commit
READS = 10  # attempts to read, while others write
PAUSE = 0.05  # seconds, times the number of attempts so far
TAKEN = {errno.EEXIST, errno.ENOTEMPTY}  # errors of a rename to the name of a folder

Read = TypeVar("Read")


def make_folder(folder: str | Path) -> None:
    """Creates a folder if it does not exist, and checks that files can be written to it.

    Raises:
        ValueError: files cannot be written to it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} must be a folder to write files in: {error}") from error


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes a folder, and new ones above it, that are empty when the `with` block raises."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not made, or not empty
            for path in made:
                path.rmdir()
        raise


@contextmanager
def saving(folder: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary folder whose files all move to `folder` if the `with` block succeeds.

    Files of an earlier save that are not written again remain. Files left by dead writers are
    removed.

    Args:
        folder: destination of the files.
        check: called after all files are written and before they become valid, while no other
            writer can commit; an error that it raises cancels the save.

    Raises:
        OSError: a file cannot be written, such as on a full disk; the message names it, and the
            earlier save is kept.
    """
    make_folder(folder)
    _put_in_place(folder)
    _remove_leftovers(folder)
    own = Path(tempfile.mkdtemp(prefix=f"{SAVING}{_writer()}-", dir=folder))
    try:
        try:
            yield own
            _flush(own)
        except write_errors() as error:
            raise OSError(
                f"{folder} cannot be written: {error}; an earlier save there is kept"
            ) from error
        with _alone(folder):
            if check is not None:
                _put_in_place(folder)
                check()
            _commit(own, folder)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    _put_in_place(folder)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` if the `with` block succeeds.

    If the writer dies earlier, nothing has that name. An existing folder is replaced. Files left by
    dead writers are removed.

    Raises:
        OSError: a file cannot be written, such as on a full disk; nothing was changed.
    """
    own = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        own = Path(tempfile.mkdtemp(prefix=f"{SAVING}{_writer()}-", dir=folder.parent))
        yield own
        _flush(own)
        discard(folder)
        os.rename(own, folder)
        _sync(folder.parent)
    except write_errors() as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes a folder atomically."""
    if folder.exists():
        away = tempfile.mkdtemp(prefix=f"{SAVING}{_writer()}-", dir=folder.parent)
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)


def current(folder: Path, name: str) -> Path:
    """The path of the valid file `name` of a folder, even before it is moved to its place."""
    waiting = folder / SAVED / name
    return waiting if waiting.exists() else folder / name


def unchanged(folder: Path, names: Sequence[str], read: Callable[[], Read]) -> Read:
    """What `read` returns for files of one save: it is called again if one is made meanwhile.

    Args:
        folder: holds the files.
        names: of files that every save replaces, such as the config; others may be logs, which
            change all the time.
        read: reads the files, finds each by `current`, and changes nothing.

    Raises:
        ValueError: saves were made all the time; or what `read` raises while none is.
    """
    last: Exception | None = None
    for attempt in range(READS):
        time.sleep(attempt * PAUSE)
        before = _save_of(folder, names)
        try:
            found = read()
        except (OSError, ValueError) as error:
            if _save_of(folder, names) == before:
                raise
            last = error
            continue
        if _save_of(folder, names) == before:
            return found
        del found  # the memory of two results may not be there
    raise ValueError(
        f"{folder} is being written to; load it again when its writers are done"
    ) from last


def _save_of(folder: Path, names: Sequence[str]) -> list[Any]:
    """What distinguishes the save in a folder from others, and from itself as its files move."""
    # The valid save first: if it is not there yet, what is in place was valid until now.
    moving: list[Path] = []
    with contextlib.suppress(OSError):
        moving = sorted((folder / SAVED).iterdir())
    found: list[Any] = []
    for path in (*moving, *(folder / name for name in names)):
        with contextlib.suppress(OSError):
            about = path.stat()
            found.append((path.name, about.st_ino, about.st_size, about.st_mtime_ns))
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for writing, renamed to `path` if the `with` block succeeds."""
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except write_errors() as error:
        raise OSError(f"{path} cannot be written: {error}; an earlier one is kept") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns errors in a file's contents into a one-line ValueError that names the file."""
    broken = importlib.import_module("safetensors").SafetensorError
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, broken) as error:
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        place = f"{path} cannot be used: "
        raise ValueError(place + reason.removeprefix(place)) from error


def safetensors() -> Any:
    """The package safetensors.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package safetensors, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error


def write_errors() -> tuple[type[Exception], ...]:
    """The exceptions raised if a file cannot be written."""
    try:
        return OSError, importlib.import_module("safetensors").SafetensorError
    except ImportError:
        return (OSError,)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Prevents other writers from committing inside the `with` block, if the system has file locks.

    The lock is on the folder itself, so a writer that dies leaves no lock file.
    """
    handle = None
    try:
        fcntl: Any = importlib.import_module("fcntl")
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):  # another system, or a file system without locks
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _commit(own: Path, folder: Path) -> None:
    """Makes `own` the valid save by one rename, which fails until the previous save is in place."""
    for _ in range(TRIES):
        try:
            os.rename(own, folder / SAVED)
            return
        except OSError as error:
            # Another process may have put the previous save in place since, which frees the name.
            taken = error.errno in TAKEN or (folder / SAVED).exists()
            if not own.exists() or not taken:
                raise
            _put_in_place(folder)
    raise OSError(f"{folder} is being written to by other processes; try again")


def _put_in_place(folder: Path) -> None:
    """Moves the files of the valid save to their places; any process may do so at any time."""
    saved = folder / SAVED
    if not saved.is_dir():
        return
    for name in sorted(os.listdir(saved), reverse=True):
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            os.replace(saved / name, folder / name)
    with contextlib.suppress(OSError):  # another save was committed meanwhile
        saved.rmdir()


def _remove_leftovers(folder: Path) -> None:
    host, _, _ = _writer().rpartition("-")
    for path in folder.glob(f"{SAVING}*"):
        of_host, _, rest = path.name.removeprefix(SAVING).partition("-")
        process = rest.partition("-")[0]
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > DEAD_AFTER
            if old or (of_host == host and process.isdigit() and not _is_alive(int(process))):
                shutil.rmtree(path, ignore_errors=True)


def _writer() -> str:
    """The part of a folder's name that identifies this process."""
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Flushes files to disk before they are renamed."""
    for path in folder.iterdir():
        path.chmod(0o666 & ~_umask())
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o777 & ~_umask())


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to disk, if the system can open folders."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _umask() -> int:
    # Linux tells it; elsewhere it can only be read by setting it, which threads must not mix.
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    with UMASK:
        mask = os.umask(0)
        os.umask(mask)
        return mask
