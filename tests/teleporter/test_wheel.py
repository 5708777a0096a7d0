"""The wheel holds the library and nothing else, and works where the repository is not."""

import os
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT


def test_the_wheel_holds_the_library_alone_and_works_outside_the_repository(tmp_path):
    source = tmp_path / "source"  # building leaves files beside the sources
    source.mkdir()
    for path in ROOT.iterdir():  # all that git knows of, so that a package found by accident would be seen
        if path.suffix in (".py", ".toml") or path.name in ("common", "teleporter", "tests", "benchmarks", "examples"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, source / path.name)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    expected = {"teleport.py", *(f"teleporter/{path.name}" for path in (ROOT / "teleporter").glob("*.py"))}
    assert {name for name in files if ".dist-info/" not in name} == expected
    metadata = next(name for name in files if name.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert [line for line in lines if line.startswith("Requires-Dist")] == ["Requires-Dist: torch>=2.4"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = (
        "import sys, teleport, teleporter; from torch import nn\n"
        "from teleporter import Attention, Pair, Teleporter, level_set_teleport, null_space_teleport\n"
        "Teleporter(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))\n"
        "print(teleport.__file__, teleporter.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=environment, text=True, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(str(wheel)) == 2
