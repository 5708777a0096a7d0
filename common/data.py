"""Datasets as float tensors in [0, 1], read once: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary layout.

`mnist-mini`, the default everywhere, lies in the repository: the 10,000 published MNIST *test* images, the first 8,000
to train on and the last 2,000 to test on. Its numbers are not MNIST's.
"""

import gzip
import hashlib
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import ROOT, UserError


class Dataset(NamedTuple):
    """Rows are samples, so that a mini-batch is a contiguous slice; `batch.T` is the paper's X."""

    name: str  # as given on the command line
    label: str  # as shown in figures and tables
    x: torch.Tensor  # (n, d_0) in [0, 1]
    y: torch.Tensor  # (n,) int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    shape: tuple  # of one image: (channels, height, width)
    files: dict  # file name -> SHA-256

    @property
    def features(self):
        return self.x.shape[1]


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)

# Published mirrors, and the MD5 of each published file (published as MD5; our own records use SHA-256).
_MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_FASHION_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_CIFAR_URLS = ("https://www.cs.toronto.edu/~kriz/",)
DOWNLOADS = {
    "MNIST": (
        _MNIST_URLS,
        dict(
            zip(
                [name + ".gz" for name in _IDX],
                [
                    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "d53e105ee54ea40749a09fcbcd1e9432",
                    "9fb629c4189551a2d022fa330f9573f3",
                    "ec29112dd5afa0611ce80d1b7f02629c",
                ],
            )
        ),
    ),
    "FashionMNIST": (
        _FASHION_URLS,
        dict(
            zip(
                [name + ".gz" for name in _IDX],
                [
                    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "25c81989df183df01b3e8a0aad5dffbe",
                    "bef4ecab320f06d8554ea6380940ec79",
                    "bb300cfdad3c16e7a12a480ee83cd310",
                ],
            )
        ),
    ),
    "CIFAR10": (_CIFAR_URLS, {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}
NAMES = ("mnist-mini", *DOWNLOADS)
LABELS = {"mnist-mini": "mnist-mini", "MNIST": "MNIST", "FashionMNIST": "Fashion-MNIST", "CIFAR10": "CIFAR-10"}

# The published CIFAR-10 files start with these labels (frog, truck, truck, deer, …). A copy that went through JPEG and
# a shuffle has the same layout but other pixels and order: its results must not be called CIFAR-10's.
_CIFAR_FIRST_LABELS = (6, 9, 9, 4, 1, 1, 2, 7, 8, 3)


def load(name, data_dir=None, device="cpu"):
    """Return the Dataset called `name` (one of NAMES) from `data_dir` (default: data/ in the repository)."""
    if name not in NAMES:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    folder, files = locate(name, data_dir)
    raw = {file: (folder / file).read_bytes() for file in files}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in raw.items()}
    label = LABELS[name]
    if name == "CIFAR10":
        records = [_cifar_records(folder / file, raw[file]) for file in files]
        train, test = np.concatenate(records[:-1]), records[-1]
        x, y, x_test, y_test = train[:, 1:], train[:, 0], test[:, 1:], test[:, 0]
        shape = (3, 32, 32)
        if tuple(y[:10]) != _CIFAR_FIRST_LABELS:
            label = "CIFAR-10 (JPEG)"
    else:
        arrays = [_idx(folder / file, raw[file], 3 if "images" in file else 1) for file in files]
        for images, labels, file in zip(arrays[::2], arrays[1::2], files[::2]):
            if len(images) != len(labels):
                raise UserError(f"{folder / file}: {len(images)} images but {len(labels)} labels beside them")
        shape = (1, *arrays[0].shape[1:])
        if name == "mnist-mini":
            images, y = arrays[0].reshape(len(arrays[0]), -1), arrays[1]
            x, y, x_test, y_test = images[:8000], y[:8000], images[8000:], y[8000:]
        else:
            x, y, x_test, y_test = (a.reshape(len(a), -1) if a.ndim == 3 else a for a in arrays)

    def pixels(a):
        return torch.from_numpy(a.astype(np.float32)).to(device).div_(255)

    def classes(a):
        return torch.from_numpy(a.astype(np.int64)).to(device)

    return Dataset(name, label, pixels(x), classes(y), pixels(x_test), classes(y_test), shape, hashes)


def published_split(data):
    """The part of the training set that paper A trains on: MNIST and Fashion-MNIST lose 10,000 validation images.

    The same samples in the same order as `random_split([50000, 10000], generator=seed 1)`; other datasets stay whole.
    """
    if data.name not in ("MNIST", "FashionMNIST"):
        return data
    keep = torch.randperm(60000, generator=torch.Generator().manual_seed(1))[:50000].to(data.x.device)
    return data._replace(x=data.x[keep], y=data.y[keep])


def download(name, data_dir=None, quiet=False):
    """Fetch dataset `name` into `data_dir`, verify its checksums, return its folder. What is there already is kept:
    a complete dataset that can be read, whatever its checksums, and of an incomplete one the files that are right."""
    if name not in DOWNLOADS:
        raise UserError(f"cannot download {name!r}: choose from {', '.join(DOWNLOADS)}")
    root = Path(data_dir) if data_dir else ROOT / "data"
    try:
        load(name, root)
        return locate(name, root)[0]
    except UserError:  # missing, incomplete or corrupt
        pass
    urls, files = DOWNLOADS[name]
    folder = root if name == "CIFAR10" else root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in files.items():
        _fetch([url + file for url in urls], folder / file, md5, quiet)
    if name == "CIFAR10":
        with tarfile.open(folder / "cifar-10-binary.tar.gz") as archive:
            for file in _CIFAR:
                member = archive.extractfile(f"cifar-10-batches-bin/{file}")
                _write_atomically(folder / "cifar-10-batches-bin" / file, member.read())
        (folder / "cifar-10-binary.tar.gz").unlink()
        return folder / "cifar-10-batches-bin"
    return folder


def locate(name, data_dir=None):
    """Find the folder that holds the dataset's files, and their names there (IDX files may be gzipped or plain)."""
    root = Path(data_dir) if data_dir else ROOT / "data"
    if name == "mnist-mini":
        root, wanted, folders = ROOT / "data", _IDX[2:], [ROOT / "data" / "mnist-mini"]
    elif name == "CIFAR10":
        wanted = _CIFAR
        folders = [root / "cifar-10-batches-bin", root / "CIFAR10" / "cifar-10-batches-bin", root / "CIFAR10", root]
    else:
        wanted, folders = _IDX, [root / name / "raw", root / name]
    for folder in folders:
        found = [next((f for f in (w + ".gz", w) if (folder / f).is_file()), None) for w in wanted]
        if all(found):
            return folder, found
        if any(found):
            missing = ", ".join(w for w, f in zip(wanted, found) if f is None)
            raise UserError(f"{folder} is incomplete: {missing} missing")
    raise UserError(
        f"dataset {name} not found in {root}: run `python init_directory.py --download {name}`, or put its files into "
        f"{folders[0]}, or use the embedded --dataset mnist-mini"
        if name != "mnist-mini"
        else f"the embedded dataset is missing from {folders[0]}: restore it with `git checkout data/mnist-mini`"
    )


def _idx(path, content, dimensions):
    """Parse one IDX file of unsigned bytes: magic (0, 0, 8, number of dimensions), the sizes, the data."""
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is truncated or corrupt ({error}): download it again") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an IDX file of {dimensions}-dimensional bytes (wrong magic number)")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(sizes, dtype=np.int64):
        raise UserError(f"{path} is truncated or corrupt: {len(content) - header} bytes of data for sizes {sizes}")
    if dimensions == 3 and sizes[1:] != (28, 28):
        raise UserError(f"{path} has images of {sizes[1]}x{sizes[2]} pixels, expected 28x28")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def _cifar_records(path, content):
    """Rows of 3073 bytes: the label, then 1024 red, 1024 green and 1024 blue pixels; 10,000 of them in a file."""
    if len(content) != 10000 * 3073:
        raise UserError(f"{path} is truncated or corrupt: {len(content)} bytes, expected {10000 * 3073}")
    records = np.frombuffer(content, np.uint8).reshape(10000, 3073)
    if records[:, 0].max() > 9:
        raise UserError(f"{path} is corrupt: label {records[:, 0].max()} (expected 0 to 9)")
    return records


def _fetch(urls, path, md5, quiet):
    """Download to path.part (continued if it is there), verify, rename: `path` exists only when it is right."""
    if path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() == md5:
        return
    part, reason = path.with_name(path.name + ".part"), "no mirror"
    for url in urls:
        try:
            start = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                resumed = response.status == 206
                total = int(response.headers.get("Content-Length") or 0) + (start if resumed else 0)
                bar = tqdm(
                    desc=path.name,
                    total=total,
                    initial=start if resumed else 0,
                    unit="B",
                    unit_scale=True,
                    disable=quiet,
                )
                with open(part, "ab" if resumed else "wb") as file, bar:
                    while block := response.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
        except (urllib.error.URLError, OSError) as error:
            reason = f"{url}: {getattr(error, 'reason', error)}"
            continue
        if hashlib.md5(part.read_bytes()).hexdigest() == md5:
            part.replace(path)
            return
        reason = f"{url}: wrong checksum"
        part.unlink()
    raise UserError(f"could not download {path.name} ({reason}): get it elsewhere and put it into {path.parent}")


def _write_atomically(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
