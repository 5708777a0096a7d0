"""Fetch the published datasets: from mirrors, verified, continued where an earlier attempt stopped, all or nothing.

What arrives goes to <file>.part, which stays until the file is complete and its checksum right. A mirror that fails,
in whatever way, costs nothing but its turn: the next one continues the same part.
"""

import http.client
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from common import ROOT, UserError
from common.data import CIFAR_FILES, IDX_FILES, Dataset, load, md5
from common.files import lock, write

_MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_FASHION_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_CIFAR_URLS = ("https://www.cs.toronto.edu/~kriz/",)
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
# Published mirrors, and the published checksum of each file.
SOURCES = {
    "MNIST": (_MNIST_URLS, {f"{name}.gz": checksum for name, checksum in zip(IDX_FILES, _MNIST_MD5)}),
    "FashionMNIST": (_FASHION_URLS, {f"{name}.gz": checksum for name, checksum in zip(IDX_FILES, _FASHION_MD5)}),
    "CIFAR10": (_CIFAR_URLS, {_CIFAR_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"}),
}

_TIMEOUT = 30  # seconds: a mirror that is silent, or slower than _SLOWEST, for so long is given up
_SLOWEST = 1000  # bytes a second
_LARGEST = 1 << 28  # bytes; the largest file, CIFAR-10's archive, has 0.17 GB
_TRIES = 5  # of one mirror, as long as each brings something


def download(name: str, data_dir: str | Path | None = None, quiet: bool = False) -> Dataset:
    """Fetch dataset `name` into `data_dir` (default: data/ in the repository) and return it, read.

    What is there already is kept: a complete dataset that can be read, whatever its checksums, and of an incomplete
    one the files that are right. Raises UserError where no mirror delivers; what came is kept, and the next call
    continues.
    """
    if name not in SOURCES:
        raise UserError(f"cannot download {name!r}: choose from {', '.join(SOURCES)}")
    root = Path(data_dir) if data_dir else ROOT / "data"
    try:
        return load(name, root)
    except UserError:  # missing, incomplete or damaged
        pass
    urls, files = SOURCES[name]
    folder = root if name == "CIFAR10" else root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, checksum in files.items():
        fetch([url + file for url in urls], folder / file, checksum, quiet)
    if name == "CIFAR10":
        with tarfile.open(folder / _CIFAR_ARCHIVE) as archive:
            for file in CIFAR_FILES:
                batch = f"cifar-10-batches-bin/{file}"
                write({folder / batch: archive.extractfile(batch).read()})
        (folder / _CIFAR_ARCHIVE).unlink()
    return load(name, root)


def fetch(urls: list[str], path: Path, checksum: str, quiet: bool = False) -> None:
    """Download the file with this MD5 from the first of `urls` that delivers it; keep one that is there already.

    Raises UserError, one line that says what each mirror did wrong, if none delivers.
    """
    if path.is_file() and md5(path.read_bytes()).hexdigest() == checksum:
        return
    part, reasons = path.with_name(path.name + ".part"), []
    busy = f"{part} is being written by another download: wait for it, and run this again"
    with lock(part.with_name(part.name + ".lock"), busy):
        with _open_part(part) as file:
            complete = _checksum(file) == checksum  # what an interrupted run had no time to rename
            for url in urls if not complete else ():
                fault = _from_mirror(url, file, checksum, path.name, quiet)
                if fault is None:
                    complete = True
                    break
                reasons.append(f"{url}: {fault}")
            came = _size(file)
        if complete:
            os.replace(part, path)
            return
        if not came:
            part.unlink()
    kept = f"run it again to continue ({came} bytes are kept), or " if came else ""
    reasons = "; ".join(reasons)
    raise UserError(f"could not download {path.name} ({reasons}): {kept}get it elsewhere and put it into {path.parent}")


class _Fault(Exception):
    """What a mirror did wrong, in words; `unusable`: what is there now cannot be the beginning of the file."""

    def __init__(self, words: str, unusable: bool = False) -> None:
        super().__init__(words)
        self.unusable = unusable


def _from_mirror(url: str, file: BinaryIO, checksum: str, name: str, quiet: bool) -> str | None:
    """Continue `file` from one mirror, as long as each attempt brings something. Returns what went wrong, or None.

    Where continuing led to a wrong file, the mirror gets one chance to send it from the start.
    """
    words = ""
    for _ in range(_TRIES):
        before = _size(file)
        try:
            _receive(url, file, name, quiet)
        except _Fault as fault:
            words, unusable = str(fault), fault.unusable
            if not unusable and _size(file) <= before:
                return words
        else:
            if _checksum(file) == checksum:
                return None
            words, unusable = "wrong checksum", True
        if unusable:
            file.truncate(0)
            if before == 0:
                return words
    return words


def _receive(url: str, file: BinaryIO, name: str, quiet: bool) -> None:
    """Write what the mirror sends to where it belongs in `file`. Raises _Fault where it fails.

    A mirror that cannot continue starts anew, over what is there, and loses none of it before it has come further.
    """
    start = end = _size(file)
    with tqdm(desc=name, initial=start, unit="B", unit_scale=True, delay=2, leave=False, disable=quiet) as bar:
        for position, block, size in _blocks(url, start):
            file.seek(position)
            file.write(block)
            end = position + len(block)
            bar.total = size
            bar.update(end - bar.n)
    file.truncate(end)


def _blocks(url: str, start: int) -> Iterator[tuple[int, bytes, int | None]]:
    """Yield (position in the file, bytes, size of the file if known) as they arrive, from `start` if the mirror can,
    else from 0. Raises _Fault for everything that a server can do wrong."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            position, size = _extent(response, start)
            since, mark = time.monotonic(), position
            while block := response.read1(1 << 16):
                if position + len(block) > _LARGEST:
                    raise _Fault(f"sends more than {_LARGEST} bytes", unusable=True)
                yield position, block, size
                position += len(block)
                if (seconds := time.monotonic() - since) > _TIMEOUT:
                    if position - mark < _SLOWEST * seconds:
                        raise _Fault(f"slower than {_SLOWEST} bytes a second")
                    since, mark = time.monotonic(), position
            if size is not None and position < size:
                raise _Fault(f"closed after {position} of {size} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        # 416: the file is no longer than what was asked to be continued.
        raise _Fault(f"{error.code} {error.reason}", unusable=error.code == 416) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a header that makes no sense
        raise _Fault(str(getattr(error, "reason", "")) or str(error) or type(error).__name__) from None


def _extent(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """(where in the file the response begins, the file's size or None)."""
    position = start if response.status == 206 else 0
    begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status == 206 and begins and int(begins[1]) != start:
        raise _Fault(f"sends bytes from {begins[1]} on, asked for those from {start} on")
    length = response.headers.get("Content-Length", "")
    return position, position + int(length) if length.isdecimal() else None


def _open_part(part: Path) -> BinaryIO:
    """Open for reading and writing, made if missing. A link there is removed, not followed."""
    if part.is_symlink():
        part.unlink()
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(part, flags, 0o666), "r+b")


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _checksum(file: BinaryIO) -> str:
    file.seek(0)
    return md5(file.read()).hexdigest()
