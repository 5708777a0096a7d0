"""Datasets as float tensors in [0, 1], read once: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary layout.

`mnist-mini`, the default everywhere, lies in the repository: the 10,000 published MNIST *test* images, the first 8,000
to train on and the last 2,000 to test on. Its numbers are not MNIST's.

A dataset is called what its content is, by checksum, not what its folder is called: somebody's own files in MNIST's
layout are "MNIST-like, n images". Whether a file is gzipped is read from its first bytes, not from its name.
"""

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import ROOT, UserError


class Dataset(NamedTuple):
    """Rows are samples, so that a mini-batch is a contiguous slice; `batch.T` is the paper's X."""

    name: str  # as given on the command line
    label: str  # what the files hold, as shown in figures and tables
    x: torch.Tensor  # (n, d_0) in [0, 1]
    y: torch.Tensor  # (n,) int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    shape: tuple[int, ...]  # of one image: (channels, height, width)
    files: dict[str, str]  # file name -> SHA-256

    @property
    def features(self) -> int:
        """d_0, the number of inputs."""
        return self.x.shape[1]


LABELS = {"mnist-mini": "mnist-mini", "MNIST": "MNIST", "FashionMNIST": "Fashion-MNIST", "CIFAR10": "CIFAR-10"}
NAMES = tuple(LABELS)
FULL_SIZE = NAMES[1:]  # not embedded

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)
CIFAR_RECORDS = 10000  # in each file

# What known files hold, in the order of IDX_FILES or CIFAR_FILES: the SHA-256 of their content once gunzipped, since
# the same file may be packed in many ways; of the published CIFAR-10 only the MD5 is known here.
_MNIST_REST = (
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
_KNOWN = {
    "mnist-mini": _MNIST_REST[1:],
    "MNIST": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", *_MNIST_REST),
    # A copy in the published order, 0.7 % of whose training pixels are one gray level of 255 off.
    "MNIST (±1 gray level)": ("050b1bd45f0d5dbc95256d96ac6712ad396484687199b2d9d2ad8e260363a064", *_MNIST_REST),
    "Fashion-MNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "CIFAR-10": (
        "5dd7e06a14cb22eb9f671a540d1b7c25",
        "5ea93a67294ea407fff1d09f752e9692",
        "942cd6a4bcdd0dd3c604fbe906cb4421",
        "ae636b3ba5c66a11e91e8cb52e771fcb",
        "53f37980c15c3d472c316c40844f3f0d",
        "803d5f7f4d78ea53de84dbe85f74fb6d",
    ),
    # A copy whose images went through JPEG and a fixed shuffle.
    "CIFAR-10 (JPEG)": (
        "95bc40a96c189b4ae973b8e377256610c0b0865f59a76bf2e7b5f5d3b6a9cd51",
        "5bb5b7448ab13050c953f52e49624887d937f2dbc737ba8308b771b88b6f5ced",
        "ecc5c793ff8d4a06b657d4f9dfc1eb1e29f15f7e75fed9b9c34eb4df9459108d",
        "9e28b99d5925a27d404ec940d84ec491ea1cd48e3ceb0e9db193afd19c93e65b",
        "887c29d30b4a78aa9e3c200efd2298570173503aa557ab013e8e62afb37a242a",
        "18fde75bb6b08389d237f73ff3863b75b88eb8920dadf3900bc92e4e644e6545",
    ),
}
_LARGEST = 1 << 30  # bytes that a file may hold once gunzipped; CIFAR-10 has 0.2 GB in all


def load(name: str, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """Return the Dataset called `name` (one of NAMES) from `data_dir` (default: data/ in the repository).

    Raises UserError, which names the file, what it holds, what was expected and what to do, where one is missing or
    damaged.
    """
    if name not in NAMES:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    folder, files = locate(name, data_dir)
    arrays, digests, hashes = [], [], {}
    for i, file in enumerate(files):
        try:
            raw = (folder / file).read_bytes()
            hashes[file] = hashlib.sha256(raw).hexdigest()
            content = _unpacked(raw)
            digests.append({hash_(content).hexdigest() for hash_ in (hashlib.sha256, md5)})
            if name == "mnist-mini" and _KNOWN[name][i] not in digests[i]:
                found = hashlib.sha256(content).hexdigest()
                raise ValueError(f"is damaged: SHA-256 of its content {found}, expected {_KNOWN[name][i]}")
            if other := _differing_copy(folder / file, content):
                raise ValueError(f"and {other.name} hold different data, expected one of them or equal ones")
            arrays.append(_cifar_records(content) if name == "CIFAR10" else _idx(content, 1 if i % 2 else 3))
        except ValueError as error:
            raise UserError(f"{folder / file} {error}: {_advice(name)}") from None
    if name == "CIFAR10":
        train, test = np.concatenate(arrays[:-1]), arrays[-1]
        split, shape = (train[:, 1:], train[:, 0], test[:, 1:], test[:, 0]), (3, 32, 32)
    else:
        _check_counts(name, folder, files, arrays)
        shape = (1, *arrays[0].shape[1:])
        split = tuple(a.reshape(len(a), -1) if a.ndim == 3 else a for a in arrays)
        if name == "mnist-mini":
            split = split[0][:8000], split[1][:8000], split[0][8000:], split[1][8000:]
    known = [label for label, wanted in _KNOWN.items() if _all_in(wanted, digests)]
    label = known[0] if known else f"{'CIFAR-10' if name == 'CIFAR10' else 'MNIST'}-like, {len(split[0])} images"
    x, y, x_test, y_test = (_to_tensor(a, device) for a in split)
    return Dataset(name, label, x, y, x_test, y_test, shape, hashes)


def _to_tensor(a: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """Pixels, in rows, as float32 in [0, 1]; labels as int64."""
    if a.ndim == 1:
        return torch.from_numpy(a.astype(np.int64)).to(device)
    return torch.from_numpy(a.astype(np.float32)).to(device).div_(255)


def published_split(data: Dataset) -> Dataset:
    """The part of the training set that the ICLR 2024 paper trains on: (Fashion-)MNIST loses 10,000 validation images.

    The same samples in the same order as `random_split([50000, 10000], generator=seed 1)`; somebody's own n images in
    the same layout lose n // 6; other datasets stay whole.
    """
    if data.name not in ("MNIST", "FashionMNIST"):
        return data
    n = len(data.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1), device="cpu")
    keep = order[: n - n // 6].to(data.x.device)
    return data._replace(x=data.x[keep], y=data.y[keep])


def require(data: Dataset, train: int, test: int = 1) -> None:
    """Raise UserError unless there are so many images to train and to test on: somebody's own data may have few."""
    if len(data.x) < train or len(data.x_test) < test:
        raise UserError(
            f"{data.label}: {len(data.x)} training and {len(data.x_test)} test images are left to use, but at least "
            f"{train} and {test} are needed: take a larger dataset, or the embedded --dataset mnist-mini"
        )


def locate(name: str, data_dir: str | Path | None = None) -> tuple[Path, list[str]]:
    """Find the folder that holds the dataset's files, and their names there, train before test.

    Files may be gzipped or plain, IDX files named with a dot (`train-images.idx3-ubyte`). Raises UserError where the
    dataset is missing or incomplete.
    """
    root = Path(data_dir) if data_dir else ROOT / "data"
    if name == "mnist-mini":
        wanted, folders = IDX_FILES[2:], [ROOT / "data" / "mnist-mini"]
    elif name == "CIFAR10":
        wanted = CIFAR_FILES
        folders = [root / "cifar-10-batches-bin", root / "CIFAR10" / "cifar-10-batches-bin", root / "CIFAR10", root]
    else:
        wanted, folders = IDX_FILES, [root / name / "raw", root / name]
    problem = None
    for folder in folders:
        found = [next((f for f in _spellings(w) if (folder / f).is_file()), None) for w in wanted]
        if all(found):
            return folder, found
        if any(found) and not problem:
            missing = ", ".join(w for w, f in zip(wanted, found) if f is None)
            problem = f"{folder} is incomplete: {missing} missing (looked for it as it is, gzipped and with dots)"
    if name == "mnist-mini":
        raise UserError(f"{problem or f'the embedded dataset is missing from {folders[0]}'}: {_advice(name)}")
    if name == "CIFAR10" and not problem and (root / "cifar-10-batches-py").exists():
        problem = f"{root / 'cifar-10-batches-py'} is the pickled version of CIFAR-10, expected the binary one"
    raise UserError(
        f"{problem or f'dataset {name} not found in {root}'}: run `python init_directory.py --download {name}`, or "
        f"put its files into {folders[0]}, or use the embedded --dataset mnist-mini"
    )


def md5(content: bytes = b"") -> "hashlib._Hash":
    """The checksum that the datasets were published with: good against accidents."""
    return hashlib.md5(content, usedforsecurity=False)


def _spellings(name: str) -> Iterator[str]:
    """The names under which people keep the file `name`."""
    for spelling in dict.fromkeys((name, name.replace("-idx", ".idx"))):
        yield from (spelling + ".gz", spelling)


def _differing_copy(path: Path, content: bytes) -> Path | None:
    """Another spelling of the same file beside it, with other content: nobody can know which one is meant."""
    for spelling in _spellings(path.name.removesuffix(".gz").replace(".idx", "-idx")):
        other = path.with_name(spelling)
        if other != path and other.is_file():
            try:
                if _unpacked(other.read_bytes()) != content:
                    return other
            except ValueError:  # damaged
                return other
    return None


def _advice(name: str) -> str:
    if name == "mnist-mini":
        return "restore it with `git checkout data/mnist-mini`"
    return f"mend it, or move it away and run `python init_directory.py --download {name}`"


def _all_in(wanted: tuple[str, ...], digests: list[set[str]]) -> bool:
    return len(wanted) == len(digests) and all(w in d for w, d in zip(wanted, digests))


def _unpacked(raw: bytes) -> bytes:
    """The content, gunzipped if it is gzip: no IDX file and no CIFAR-10 batch begins as gzip does."""
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"is truncated or corrupt gzip ({error})") from None
    if len(content) > _LARGEST:
        raise ValueError(f"unpacks to more than {_LARGEST} bytes")
    return content


def _idx(content: bytes, dimensions: int) -> np.ndarray:
    """Parse one IDX file of unsigned bytes: magic (0, 0, 8, number of dimensions), the sizes, the data."""
    header, magic = 4 + 4 * dimensions, bytes([0, 0, 8, dimensions])
    if len(content) < header or content[:4] != magic:
        what = "images" if dimensions == 3 else "labels"
        raise ValueError(
            f"is truncated or no IDX file of {what}: {len(content)} bytes that begin with {content[:4].hex(' ')!r}, "
            f"expected the magic number {magic.hex(' ')!r}"
        )
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    found, expected = len(content) - header, math.prod(sizes)
    if found != expected:
        problem = "is truncated" if found < expected else f"has {found - expected} trailing bytes"
        raise ValueError(f"{problem}: {found} bytes of data, expected {expected} for the sizes {sizes} in its header")
    if dimensions == 3 and sizes[1:] != (28, 28):
        raise ValueError(f"has images of {sizes[1]}x{sizes[2]} pixels, expected 28x28")
    array = np.frombuffer(content, np.uint8, offset=header).reshape(sizes)
    if dimensions == 1:
        _check_labels(array)
    return array


def _cifar_records(content: bytes) -> np.ndarray:
    """Rows of 3073 bytes: the label, then 1024 red, 1024 green and 1024 blue pixels."""
    if len(content) != CIFAR_RECORDS * 3073:
        raise ValueError(f"is truncated or corrupt: {len(content)} bytes, expected {CIFAR_RECORDS} records of 3073")
    records = np.frombuffer(content, np.uint8).reshape(CIFAR_RECORDS, 3073)
    _check_labels(records[:, 0])
    return records


def _check_labels(labels: np.ndarray) -> None:
    if len(labels) and labels.max() > 9:
        i = int((labels > 9).argmax())
        raise ValueError(f"has label {labels[i]} at image {i}, expected 0 to 9")


def _check_counts(name: str, folder: Path, files: list[str], arrays: list[np.ndarray]) -> None:
    """As many labels as images; at least one image to test on, and six to train on, of which one is held out."""
    for images, labels, file, beside, needed in zip(arrays[::2], arrays[1::2], files[::2], files[1::2], (6, 1)):
        if len(images) != len(labels):
            problem = f"holds {len(images)} images but {beside} {len(labels)} labels, expected as many"
        elif len(images) < needed:
            problem = f"holds {len(images)} images, expected at least {needed}"
        else:
            continue
        raise UserError(f"{folder / file} {problem}: {_advice(name)}")
