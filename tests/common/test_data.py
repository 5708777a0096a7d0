"""Reading datasets: what is read, what it is called, and what is said when a file is not what it should be."""

import gzip
import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError, data

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder, seed=0):
    """A small dataset in MNIST's layout: gzipped images, plain labels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for split, n in (("train", 30), ("t10k", 20)):
        images = idx(generator.integers(0, 256, (n, 28, 28)))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(generator.integers(0, 10, n)))
    return folder


@pytest.fixture
def mnist(tmp_path):
    return write_mnist(tmp_path / "MNIST" / "raw")


def write_cifar(folder, n):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for file in data.CIFAR_FILES:
        records = generator.integers(0, 256, (n, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / file).write_bytes(records.tobytes())
    return folder


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_RECORDS", 20)
    return write_cifar(tmp_path / "cifar-10-batches-bin", 20)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def refused(name, folder, *words):
    """Loading is refused in one line that holds the words and says what to do."""
    with pytest.raises(UserError) as error:
        data.load(name, folder)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line
    assert "init_directory.py --download" in line or "git checkout data/mnist-mini" in line
    return line


def test_embedded_data_is_the_published_test_set():
    mini = data.load("mnist-mini")
    assert mini.x.shape == (8000, 784) and mini.x_test.shape == (2000, 784) and mini.shape == (1, 28, 28)
    assert mini.x.dtype == torch.float32 and mini.x.min() == 0 and mini.x.max() == 1 and mini.label == "mnist-mini"
    assert mini.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert set(mini.files) == {"t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}


def cut_to_100(file):
    array = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)
    images = "images" in file.name
    kept = array[16:].reshape(-1, 28, 28)[:100] if images else array[8:108]
    file.write_bytes(gzip.compress(idx(kept), 1))


def change_a_pixel(file):
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[-1] ^= 1
    file.write_bytes(gzip.compress(bytes(content), 1))


@pytest.mark.parametrize(
    "damage", [cut_to_100, change_a_pixel, lambda f: f.write_bytes(f.read_bytes()[:900]), lambda f: f.unlink()]
)
def test_damaged_embedded_data_is_noticed(tmp_path, monkeypatch, damage):
    folder = tmp_path / "data" / "mnist-mini"
    folder.mkdir(parents=True)
    for file in (ROOT / "data" / "mnist-mini").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(data, "ROOT", tmp_path)
    assert data.load("mnist-mini").label == "mnist-mini"
    for file in sorted(folder.iterdir()):  # images and labels, so that the counts agree
        damage(file)
    refused("mnist-mini", None, str(folder))


def test_idx_gzipped_and_plain(mnist):
    loaded = data.load("MNIST", mnist.parents[1])
    assert loaded.x.shape == (30, 784) and loaded.y_test.shape == (20,) and loaded.label == "MNIST-like, 30 images"
    raw = gzip.decompress((mnist / IMAGES).read_bytes())
    assert torch.equal(loaded.x[0, :5], torch.tensor(list(raw[16:21]), dtype=torch.float32) / 255)


def test_packing_and_spelling_change_nothing(mnist):
    """Gzip under a plain name, plain under gzip's, dots for hyphens: the same tensors and the same label."""
    before = data.load("MNIST", mnist.parents[1])
    for file in sorted(mnist.iterdir()):
        packed, plain = file.name.endswith(".gz"), file.name.removesuffix(".gz").replace("-idx", ".idx")
        content = file.read_bytes()
        file.unlink()
        (mnist / plain).write_bytes(content) if packed else (mnist / f"{plain}.gz").write_bytes(content)
    assert sorted(f.name for f in mnist.iterdir())[0] == "t10k-images.idx3-ubyte"
    after = data.load("MNIST", mnist.parents[1])
    assert after.label == before.label
    for a, b in zip(before[2:6], after[2:6]):
        assert torch.equal(a, b)


def test_two_copies_of_a_file(mnist):
    """The plain file beside its gzip is the usual thing to have; with other data in it, it is refused."""
    content = gzip.decompress((mnist / IMAGES).read_bytes())
    (mnist / IMAGES.removesuffix(".gz")).write_bytes(content)
    assert data.load("MNIST", mnist.parents[1]).x.shape == (30, 784)
    (mnist / IMAGES.removesuffix(".gz")).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("MNIST", mnist.parents[1], IMAGES, f"{IMAGES.removesuffix('.gz')} hold different data")


def test_names_say_what_the_content_is(mnist, monkeypatch):
    """By checksum of the content: however it is packed, and whatever the folder or the command line calls it."""
    contents = [gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw for raw in map(read, data_files(mnist))]
    monkeypatch.setitem(data._KNOWN, "MNIST", tuple(sha256(content) for content in contents))
    assert data.load("MNIST", mnist.parents[1]).label == "MNIST"
    (mnist / IMAGES).write_bytes(gzip.compress(contents[0], 1))
    assert data.load("MNIST", mnist.parents[1]).label == "MNIST"
    mnist.parent.rename(mnist.parents[1] / "FashionMNIST")
    fashion = mnist.parents[1] / "FashionMNIST" / "raw"
    assert data.load("FashionMNIST", mnist.parents[1]).label == "MNIST"
    (fashion / IMAGES).write_bytes(gzip.compress(contents[0][:-1] + bytes([contents[0][-1] ^ 1])))
    assert data.load("FashionMNIST", mnist.parents[1]).label == "MNIST-like, 30 images"


def data_files(folder):
    return [next(folder.glob(f"{name}*")) for name in data.IDX_FILES]


def read(path):
    return path.read_bytes()


def test_committed_results_are_called_by_their_content():
    """The labels in results/ against the checksums there: CIFAR-10's files are not packed, so they can be compared."""
    records = [json.loads(path.read_text(encoding="utf-8"))["dataset"] for path in (ROOT / "results").glob("*.json")]
    cifar = [r for r in records if r["label"].startswith("CIFAR-10")]
    assert cifar
    for record in cifar:
        assert data._KNOWN[record["label"]] == tuple(record["sha256"][file] for file in data.CIFAR_FILES)


def test_published_split_is_random_split():
    fake = data.load("mnist-mini")._replace(name="MNIST", x=torch.arange(60000.0)[:, None], y=torch.arange(60000))
    subset, _ = torch.utils.data.random_split(range(60000), [50000, 10000], torch.Generator().manual_seed(1))
    assert torch.equal(data.published_split(fake).y, torch.tensor(subset.indices))
    assert data.published_split(fake._replace(name="CIFAR10")).y.shape == (60000,)


@given(n=st.integers(6, 200) | st.integers(59_000, 71_000))
@settings(max_examples=20, deadline=None)
def test_published_split_of_any_number_of_images(n):
    """People write their own IDX files: a sixth is held out, nothing is lost or repeated, nothing raises."""
    x = torch.arange(float(n))[:, None]
    fake = data.Dataset("MNIST", f"MNIST-like, {n} images", x, torch.arange(n), x, torch.arange(n), (1, 28, 28), {})
    kept = data.published_split(fake).y
    assert len(kept) == n - n // 6 == len(kept.unique()) and torch.equal(data.published_split(fake).x[:, 0], kept + 0.0)


def test_cifar_binary_layout(cifar):
    """Any records in CIFAR-10's layout are read; noise is not called CIFAR-10, nor a copy that is known."""
    loaded = data.load("CIFAR10", cifar.parent)
    assert loaded.x.shape == (100, 3072) and loaded.shape == (3, 32, 32) and loaded.label == "CIFAR-10-like, 100 images"
    records = np.frombuffer((cifar / "test_batch.bin").read_bytes(), np.uint8).reshape(20, 3073)
    assert loaded.y_test.tolist() == records[:, 0].tolist()
    assert torch.equal(loaded.x_test[3], torch.from_numpy(records[3, 1:].astype(np.float32)) / 255)


@pytest.mark.parametrize("checksum", [sha256, lambda content: data.md5(content).hexdigest()])
def test_cifar_is_known_by_either_checksum(cifar, monkeypatch, checksum):
    digests = tuple(checksum((cifar / file).read_bytes()) for file in data.CIFAR_FILES)
    monkeypatch.setitem(data._KNOWN, "CIFAR-10", digests)
    assert data.load("CIFAR10", cifar.parent).label == "CIFAR-10"
    monkeypatch.setitem(data._KNOWN, "CIFAR-10", digests[::-1])  # the same batches in another order
    assert data.load("CIFAR10", cifar.parent).label == "CIFAR-10-like, 100 images"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda raw: raw[:-1], ["61459 bytes", "expected 20 records of 3073"]),
        (lambda raw: raw + b"x", ["61461 bytes", "expected 20 records of 3073"]),
        (lambda raw: raw[:3073] + b"\x0b" + raw[3074:], ["label 11 at image 1", "expected 0 to 9"]),
        (lambda raw: b"", ["0 bytes"]),
        (lambda raw: gzip.compress(raw)[:-20], ["corrupt gzip"]),
    ],
)
def test_damaged_cifar_batches_are_named(cifar, damage, words):
    file = cifar / "data_batch_3.bin"
    file.write_bytes(damage(file.read_bytes()))
    refused("CIFAR10", cifar.parent, str(file), *words)


def images(n, side=28):
    return gzip.compress(idx(np.zeros((n, side, side))))


@pytest.mark.parametrize(
    "file, damage, words",
    [
        (IMAGES, lambda raw: None, ["incomplete", "train-images-idx3-ubyte missing"]),
        (IMAGES, lambda raw: raw[:-50], ["corrupt gzip"]),
        (IMAGES, lambda raw: raw + b"more", ["corrupt gzip"]),
        (IMAGES, lambda raw: b"not gzip", ["8 bytes that begin with '6e 6f 74 20'", "'00 00 08 03'"]),
        (IMAGES, lambda raw: b"", ["0 bytes"]),
        (IMAGES, lambda raw: gzip.compress(b"\x00\x00\x09\x03" + bytes(100)), ["'00 00 09 03'", "'00 00 08 03'"]),
        (IMAGES, lambda raw: images(30, 14), ["14x14", "expected 28x28"]),
        (IMAGES, lambda raw: images(29), ["29 images", "30 labels", LABELS]),
        (IMAGES, lambda raw: images(0), ["0 images", "30 labels"]),
        (IMAGES, lambda raw: gzip.compress(idx(np.zeros((30, 28, 28)))[:-1]), ["truncated", "23519", "23520"]),
        (IMAGES, lambda raw: gzip.compress(idx(np.zeros((30, 28, 28))) + b"xy"), ["2 trailing bytes"]),
        (IMAGES, lambda raw: gzip.compress(b"\x00\x00\x08\x03" + b"\xff" * 12), ["truncated", str((2**32 - 1) ** 3)]),
        (LABELS, lambda raw: raw[:-1] + b"\x0a", ["label 10 at image 29", "expected 0 to 9"]),
        (LABELS, lambda raw: raw + b"x", ["1 trailing bytes"]),
        (LABELS, lambda raw: images(30), ["'00 00 08 03'", "'00 00 08 01'"]),
    ],
)
def test_damaged_idx_files_are_named(mnist, file, damage, words):
    content = damage((mnist / file).read_bytes())
    (mnist / file).unlink() if content is None else (mnist / file).write_bytes(content)
    refused("MNIST", mnist.parents[1], str(mnist if content is None else mnist / file), *words)


@pytest.mark.parametrize("split, n, words", [("train", 5, "at least 6"), ("t10k", 0, "at least 1"), ("train", 0, "0")])
def test_too_few_images_are_refused(mnist, split, n, words):
    (mnist / f"{split}-images-idx3-ubyte.gz").write_bytes(images(n))
    (mnist / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.zeros(n)))
    refused("MNIST", mnist.parents[1], f"{split}-images-idx3-ubyte.gz", f"{n} images", words)


@pytest.mark.parametrize("script", ["correlation.py", "teleport_optimization.py", "teleport_sharpness_curvature.py"])
def test_scripts_say_when_the_images_are_too_few(mnist, tmp_path, script):
    """Fewer than one of their batches: a line, where they would run without it and draw nothing, or fail."""
    options = ("--preset", "tiny", "--dataset", "MNIST")
    status, _, error = run_inside(script, *options, output=tmp_path, data_dir=mnist.parents[1])
    assert status == 2 and error.startswith("error: MNIST-like, 30 images: 25 training and 20 test images"), error
    assert error.count("\n") == 1


def test_gzip_that_unpacks_without_end_is_refused(mnist, monkeypatch):
    monkeypatch.setattr(data, "_LARGEST", 100_000)
    (mnist / IMAGES).write_bytes(gzip.compress(idx(np.zeros((30, 28, 28))) + bytes(1_000_000)))
    refused("MNIST", mnist.parents[1], IMAGES, "more than 100000 bytes")


@given(file=st.sampled_from(data.IDX_FILES), packed=st.booleans(), cut=st.integers(0, 40), junk=st.binary(max_size=24))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_content_is_read_or_refused(tmp_path, file, packed, cut, junk):
    """The beginning of a file replaced by anything, so that header and data disagree: never another error."""
    folder = tmp_path / "MNIST" / "raw"
    if not folder.exists():
        write_mnist(folder)
    path = data_files(folder)[data.IDX_FILES.index(file)]
    before = path.read_bytes()
    content = junk + (gzip.decompress(before) if before[:2] == b"\x1f\x8b" else before)[cut:]
    try:
        path.write_bytes(gzip.compress(content) if packed else content)
        data.load("MNIST", tmp_path)
    except UserError as error:
        assert path.name in str(error) or "expected as many" in str(error)
    finally:
        path.write_bytes(before)


def test_missing_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--download FashionMNIST.*FashionMNIST/raw.*mnist-mini"):
        data.load("FashionMNIST", tmp_path)
    with pytest.raises(UserError, match="unknown dataset"):
        data.load("SVHN", tmp_path)


def test_the_pickled_cifar_is_not_read(tmp_path):
    """What torchvision leaves behind: it is there, and yet cannot be used."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    refused("CIFAR10", tmp_path, f"{tmp_path / 'cifar-10-batches-py'} is the pickled version", "the binary one")


def test_a_complete_folder_counts_before_an_incomplete_one(mnist):
    """A stray file in MNIST/raw does not hide the dataset in MNIST/."""
    for file in mnist.iterdir():
        file.rename(mnist.parent / file.name)
    (mnist / LABELS).write_bytes(b"stray")
    assert data.locate("MNIST", mnist.parents[1])[0] == mnist.parent
