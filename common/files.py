"""Files that nothing leaves half-written and no link leads astray, and the lock of an experiment."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


def relative(path: Path) -> str:
    """Relative to the current folder where possible: shorter to read, and no absolute path in messages."""
    return os.path.relpath(path)


def write(contents: dict[Path, bytes]) -> None:
    """Write files, {path: content}, in one folder or several: each is complete or not there, and so are all together.

    Temporary names are random, in the same folder; what stands at a path, a link too, is replaced and never followed.
    All temporary files are complete before the first takes its place, so a full disk changes nothing; and whoever finds
    the last file finds the others beside it as they were written with it, even after a kill in between. Raises OSError,
    its filename the path that could not be written.
    """
    temporary = {}
    try:
        for path, content in contents.items():
            with _naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary[path] = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
                with open(handle, "wb") as file:
                    file.write(content)
                os.chmod(temporary[path], 0o666 & ~_UMASK)
        *_, last = contents
        with _naming(last):
            if len(contents) > 1:
                last.unlink(missing_ok=True)
        for path in contents:
            with _naming(path):
                os.replace(temporary[path], path)
    finally:
        for name in temporary.values():
            with contextlib.suppress(OSError):  # it took its place
                os.unlink(name)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing have no file name, or a temporary one: give them path's."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, complete or not at all."""
    write({path: text.encode()})


def npz(arrays: dict, save: Callable = np.savez_compressed) -> bytes:
    """The content of an NPZ file. Raises TypeError for what would need pickle."""
    if bad := [k for k, v in arrays.items() if np.asarray(v).dtype == object]:
        raise TypeError(f"arrays that would need pickle: {bad}")
    buffer = io.BytesIO()  # in memory: what zipfile does when a disk is full is no single error
    save(buffer, **arrays)
    return buffer.getvalue()


def save_npz(path: Path, arrays: dict, save: Callable = np.savez_compressed) -> None:
    """Write arrays, complete or not at all. Raises TypeError for what would need pickle."""
    write({path: npz(arrays, save)})


def read_json(path: Path) -> dict:
    """The dict in a JSON file. Raises UserError, naming the file, if there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{relative(path)} is corrupt: run with --fresh to make it again")
    return record


def load_npz(path: Path) -> dict[str, Any]:
    """The arrays of an NPZ file. Raises UserError, naming the file, if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{relative(path)} is corrupt ({error}): run with --fresh to make it again") from None


@contextlib.contextmanager
def lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path`, which goes when it is released; a killed process leaves it behind, but not locked.

    Raises UserError with the message if another process holds it. Folders made for the lock alone go with it.
    """
    if fcntl is None:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(path, message)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()


def _locked(path: Path, message: str) -> int | None:
    """A handle of the lock file that is at `path` after it was locked: its holder before may just have removed it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # who cannot write here disturbs nobody
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(message) from None
        os.close(handle)


@contextlib.contextmanager
def whole(*paths: Path) -> Iterator[None]:
    """What reads results inside finds all it looks for, or a UserError names their files."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{', '.join(map(relative, paths))}: what the figures and tables need is not there ({problem}): "
            "run with --fresh to make it again"
        ) from None
