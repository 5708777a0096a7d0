"""Reading datasets, and what happens when they, the options or the results folder are wrong."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside, run_script, start_script

from common import UserError, data

SCRIPT = "teleport_optimization.py"


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path):
    """A small dataset in MNIST's layout; returns its folder of files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, n in (("train", 30), ("t10k", 20)):
        images = idx(generator.integers(0, 256, (n, 28, 28)))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(generator.integers(0, 10, n)))  # plain, not gzipped
    return folder


def test_embedded_data_is_the_published_test_set():
    mini = data.load("mnist-mini")
    assert mini.x.shape == (8000, 784) and mini.x_test.shape == (2000, 784) and mini.shape == (1, 28, 28)
    assert mini.x.dtype == torch.float32 and mini.x.min() == 0 and mini.x.max() == 1
    assert mini.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert set(mini.files) == {"t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}


def test_idx_gzipped_and_plain(mnist):
    loaded = data.load("MNIST", mnist.parents[1])
    assert loaded.x.shape == (30, 784) and loaded.y_test.shape == (20,) and loaded.label == "MNIST"
    raw = gzip.decompress((mnist / "train-images-idx3-ubyte.gz").read_bytes())
    assert torch.equal(loaded.x[0, :5], torch.tensor(list(raw[16:21]), dtype=torch.float32) / 255)


def test_published_split_is_random_split():
    fake = data.load("mnist-mini")._replace(name="MNIST", x=torch.arange(60000.0)[:, None], y=torch.arange(60000))
    subset, _ = torch.utils.data.random_split(range(60000), [50000, 10000], torch.Generator().manual_seed(1))
    assert torch.equal(data.published_split(fake).y, torch.tensor(subset.indices))
    assert data.published_split(fake._replace(name="CIFAR10")).y.shape == (60000,)


def test_cifar_binary_layout(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for file in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = generator.integers(0, 256, (10000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / file).write_bytes(records.tobytes())
    loaded = data.load("CIFAR10", tmp_path)
    assert loaded.x.shape == (50000, 3072) and loaded.shape == (3, 32, 32) and loaded.label == "CIFAR-10 (JPEG)"
    assert loaded.y_test.tolist() == records[:, 0].tolist()
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="data_batch_3.bin is truncated"):
        data.load("CIFAR10", tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: f.unlink(), "incomplete"),
        (lambda f: f.write_bytes(f.read_bytes()[:-50]), "truncated or corrupt"),
        (lambda f: f.write_bytes(b"not gzip"), "truncated or corrupt"),
        (lambda f: f.write_bytes(gzip.compress(b"\x00\x00\x09\x03" + bytes(100))), "wrong magic number"),
        (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((30, 14, 14))))), "14x14"),
        (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((29, 28, 28))))), "29 images but 30 labels"),
        (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((30, 28, 28)))[:-1])), "truncated or corrupt"),
    ],
)
def test_damaged_files_are_named(mnist, damage, message):
    file = mnist / "train-images-idx3-ubyte.gz"
    damage(file)
    with pytest.raises(UserError, match=message) as error:
        data.load("MNIST", mnist.parents[1])
    assert "train-images-idx3-ubyte" in str(error.value)


def test_missing_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--download FashionMNIST.*FashionMNIST/raw.*mnist-mini"):
        data.load("FashionMNIST", tmp_path)
    with pytest.raises(UserError, match="unknown dataset"):
        data.load("SVHN", tmp_path)


def test_download_verifies_and_refuses(tmp_path):
    """From a folder served as file:// URLs: a wrong checksum is refused, a right one kept, all of it atomically."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, content in ((good, b"right"), (bad, b"wrong")):
        folder.mkdir()
        (folder / "file").write_bytes(content)
    md5 = hashlib.md5(b"right").hexdigest()
    urls = [(bad / "file").as_uri(), (good / "file").as_uri()]
    target = tmp_path / "target"
    with pytest.raises(UserError, match="wrong checksum"):
        data._fetch(urls[:1], target, md5, quiet=True)
    assert not target.exists() and not target.with_name("target.part").exists()
    data._fetch(urls, target, md5, quiet=True)
    assert target.read_bytes() == b"right"
    data._fetch(["file:///does/not/exist"], target, md5, quiet=True)  # already there: nothing to fetch
    with pytest.raises(UserError, match="could not download other"):
        data._fetch(["file:///does/not/exist"], tmp_path / "other", md5, quiet=True)


def test_download_keeps_what_can_be_read(mnist, monkeypatch):
    """make paper, continued without a network, must not want the data again; a corrupt file it must."""
    root = mnist.parents[1]
    monkeypatch.setitem(data.DOWNLOADS, "MNIST", (["file:///does/not/exist/"], data.DOWNLOADS["MNIST"][1]))
    assert data.download("MNIST", root, quiet=True) == mnist
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(UserError, match="could not download"):
        data.download("MNIST", root, quiet=True)


def complaint(*options, output, **where):
    status, stdout, stderr = run_inside(SCRIPT, "--preset", "tiny", *options, output=output, **where)
    assert status == 2 and len(stderr.strip().splitlines()) == 1 and stderr.startswith("error: "), (stdout, stderr)
    return stderr


def test_users_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "choose from" in complaint("--dataset", "SVHN", output=tmp_path)
    assert "init_directory.py --download MNIST" in complaint("--dataset", "MNIST", output=tmp_path, data_dir=tmp_path)
    assert "not a positive number" in complaint("--seeds", "0", output=tmp_path)
    assert "Not a directory" in complaint(output=tmp_path / "file")
    assert "nothing to replot" in complaint("--replot", output=tmp_path / "empty")
    if not torch.cuda.is_available():
        assert "no CUDA device" in complaint("--device", "cuda", output=tmp_path)


def test_results_of_another_configuration_are_refused(tiny, tmp_path):
    folder = tiny(SCRIPT)[0].folder
    error = complaint("--seeds", "1", output=folder)
    assert "another configuration" in error and "seeds: 2 there, 1 now" in error and "--fresh" in error
    path = folder / "results" / "tiny" / "teleport_optimization_mnist-mini.json"
    intact = path.read_text()
    try:
        path.write_text(intact[:100])
        assert "corrupt" in complaint(output=folder)
    finally:
        path.write_text(intact)


def test_killed_run_continues_with_the_same_numbers(tiny, tmp_path):
    """SIGKILL after the first part: the rerun keeps it, and ends where the uninterrupted run ended, bit for bit."""
    whole = tiny(SCRIPT)[0]
    process = start_script(SCRIPT, "--preset", "tiny", output=tmp_path)
    parts = tmp_path / "results" / "tiny" / "teleport_optimization_mnist-mini.parts"
    deadline = time.time() + 120
    while not list(parts.glob("*.npz")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    first = next(parts.glob("*.npz"))
    finished = first.stat().st_mtime_ns, first.read_bytes()
    assert not (tmp_path / "results" / "tiny" / "teleport_optimization_mnist-mini.json").exists()
    assert "another configuration" in complaint("--seeds", "1", output=tmp_path)
    assert (first.stat().st_mtime_ns, first.read_bytes()) == finished
    status, _, error = run_script(SCRIPT, "--preset", "tiny", "--quiet", output=tmp_path)
    assert status == 0 and error == ""
    results = tmp_path / "results" / "tiny"
    assert sorted(p.suffix for p in results.iterdir()) == [".json", ".npz"]
    name = "teleport_optimization_mnist-mini"
    assert (results / f"{name}.npz").read_bytes() == (whole.folder / "results" / "tiny" / f"{name}.npz").read_bytes()
    assert json.loads((results / f"{name}.json").read_text())["metrics"] == whole.records[name]["metrics"]


def test_init_directory(tmp_path):
    status, _, error = run_inside("init_directory.py", output=tmp_path)
    assert status == 0, error
    assert all((tmp_path / folder).is_dir() for folder in ("data", "figures", "results"))
    status, _, error = run_inside("init_directory.py", "--download", "SVHN", output=tmp_path)
    assert status == 2 and "error: " in error and "SVHN" in error and len(error.strip().splitlines()) == 1


def test_no_pickles():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            text = path.read_text()
            assert "import pickle" not in text and "allow_pickle=True" not in text, path


def test_torchrun_divides_the_parts_and_changes_nothing(tiny, tmp_path):
    """Two ranks write what one process writes, bit for bit (same threads each)."""
    whole = tiny(SCRIPT)[0].folder / "results" / "tiny" / "teleport_optimization_mnist-mini.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT, "--preset", "tiny"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "tiny" / whole.name).read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "results" / "tiny" / f"{whole.stem}.json").read_text())["ranks"] == 2
    assert result.stdout.count("files: ") == 1  # one rank reports
