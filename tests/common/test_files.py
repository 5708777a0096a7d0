"""Files are whole or not there, links are not followed, a killed process leaves no lock behind."""

import ast
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from common import UserError, files


def test_a_link_is_replaced_and_not_followed(tmp_path):
    treasure, path = tmp_path / "treasure", tmp_path / "result.json"
    treasure.write_text("mine")
    path.symlink_to(treasure)
    (tmp_path / "result.json.tmp").symlink_to(treasure)  # a temporary name that somebody guessed
    files.write_text(path, "new")
    assert treasure.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_files_that_belong_together_are_written_all_or_none(tmp_path):
    first, second = tmp_path / "result.npz", tmp_path / "result.json"
    files.write({first: b"old", second: b"old"})
    blocked = tmp_path / "file" / "third"
    blocked.parent.write_text("in the way")
    with pytest.raises(OSError, match="third"):
        files.write({first: b"new", second: b"new", blocked: b"new"})
    assert first.read_bytes() == second.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "result.json", "result.npz"]


def test_whoever_finds_the_last_file_finds_the_others_with_it(tmp_path, monkeypatch):
    """Killed between two files: the last one, which readers look for, is not there."""
    first, last = tmp_path / "result.npz", tmp_path / "result.json"
    files.write({first: b"old", last: b"old"})
    replace = os.replace

    def killed(source, target):
        if target == last:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write({first: b"new", last: b"new"})
    assert first.read_bytes() == b"new" and not last.exists()


def test_what_would_need_pickle_is_refused(tmp_path):
    with pytest.raises(TypeError, match="bad"):
        files.save_npz(tmp_path / "a.npz", {"bad": np.array([{}])})
    assert not os.listdir(tmp_path)


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "folder" / "experiment.lock"
    code = (
        "import pathlib, sys, time\nfrom common import files\n"
        "with files.lock(pathlib.Path(sys.argv[1]), ''):\n    print('held', flush=True)\n    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="busy"), files.lock(path, "busy"):
            pass
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    with files.lock(path, "busy"):
        pass
    assert not path.exists()


def test_a_lock_leaves_no_folder_and_follows_no_link(tmp_path):
    with files.lock(tmp_path / "a" / "b" / "lock", ""):
        pass
    assert not os.listdir(tmp_path)
    (tmp_path / "lock").symlink_to(tmp_path / "treasure")
    with pytest.raises(OSError), files.lock(tmp_path / "lock", ""):
        pass
    assert not (tmp_path / "treasure").exists()


def test_no_text_is_read_or_written_in_the_terminals_encoding():
    """Files are UTF-8 everywhere, whatever the locale says."""
    for path in ROOT.rglob("*.py"):
        if {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or "encoding" in [k.arg for k in call.keywords]:
                continue
            name, place = getattr(call.func, "attr", getattr(call.func, "id", "")), f"{path.name}:{call.lineno}"
            if isinstance(call.func, ast.Name):
                if name != "open":
                    continue
                modes = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
                assert not modes or "b" in modes[0], place
                continue
            module = getattr(getattr(call.func, "value", None), "id", "")
            assert name not in ("read_text", "write_text") or module in ("files", "run"), place
            assert not any(k.arg == "text" for k in call.keywords if module == "subprocess"), place


def test_no_pickles():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            text = path.read_text(encoding="utf-8")
            assert "import pickle" not in text and "allow_pickle=True" not in text, path
