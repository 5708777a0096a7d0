"""An experiment on disk: its finished parts and its results (common/files.py writes them, whole or not at all).

    def experiment(run: Run) -> Outcome:
        parts, seconds = run.parts(train, {"Adam": "Adam", "SGD": "SGD"})      # finished parts are not computed again
        return Outcome(metrics={...}, arrays={...}, seeds=[...], timings=seconds)

One JSON and one NPZ per experiment. Arrays are deterministic; everything that a clock measured goes to the JSON, under
"timings". A finished part is kept in <name>.parts/ until the experiment is complete, so that an interrupted run
continues. Processes divide the parts among themselves (common/jobs.py), and under torchrun ranks do (common/ranks.py;
rank 0 writes the results).
JSON knows neither NaN nor infinity: both are written as null and read back, everywhere, as NaN.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import ROOT, UserError, jobs, ranks
from common import data as datasets
from common.files import load_npz, lock, npz, read_json, relative, save_npz, write, write_text


class Outcome(NamedTuple):
    """What an experiment returns, and what judge, plot and report get back (also from disk)."""

    metrics: dict  # numbers, strings, and lists and dicts of them; keys are short identifiers
    arrays: dict  # name -> numpy array or tensor: deterministic (same seed, machine, threads: same bits)
    seeds: list = []  # the actual seeds
    timings: dict = {}  # seconds, anything a clock measured
    label: str = ""  # the dataset's name as figures show it (filled in from the data)
    settings: Any = None  # the script's Settings that it was made with (filled in)


@dataclass
class Run:
    """One experiment at one configuration: its settings, its device, its data, its finished parts."""

    name: str
    settings: Any
    device: torch.device
    folder: Path
    data_dir: Path | None = None
    quiet: bool = False
    fresh: bool = False
    jobs: int = 1  # processes that may share the parts
    processes: int = 1  # that did
    computed: bool = False  # False: the results were on disk
    files: dict = field(default_factory=dict)  # dataset files read -> SHA-256
    _data: dict = field(default_factory=dict)
    _resumed: dict = field(default_factory=dict)  # seconds of the parts that an earlier, interrupted run had finished

    def data(self, name: str | None = None) -> datasets.Dataset:
        """The Dataset called `name` (default: the settings' dataset), on the run's device."""
        name = name or self.settings.dataset
        if name not in self._data:
            self._data[name] = datasets.load(name, self.data_dir, self.device)
            self.files.update(self._data[name].files)
        return self._data[name]

    def label(self) -> str:
        """The names of the data that were read, as figures show them."""
        return ", ".join(data.label for data in self._data.values())

    def progress(self, iterable: Iterable | None = None, **options: Any) -> tqdm:
        """A tqdm bar that appears after two seconds, and never with --quiet."""
        return tqdm(iterable, **{"delay": 2, "disable": self.quiet, "leave": False, "dynamic_ncols": True, **options})

    def parts(self, function: Callable[[Any], dict], arguments: dict[str, Any]) -> tuple[dict, dict]:
        """Return {key: function(argument)} and the seconds that each took, {key: float}, in whichever run computed it.

        function returns a dict of arrays (or numbers). Each finished part is saved at once; a rerun of the same
        configuration computes only the missing ones, and one whose file is damaged.
        """
        keys = list(arguments)
        mine = keys[ranks.RANK :: ranks.WORLD]
        results = {key: self._finished(self._part(key)) for key in mine}
        missing = [key for key in mine if results[key] is None]

        def compute(key: str) -> None:
            self.quiet = self.quiet or multiprocessing.parent_process() is not None  # a bar is enough
            start = time.perf_counter()
            arrays = {k: to_array(v) for k, v in function(arguments[key]).items()}
            save_npz(self._part(key), {**arrays, "_seconds": np.float64(time.perf_counter() - start)})

        self.processes = max(self.processes, min(self.jobs, len(missing)))
        done = jobs.each(compute, missing, self.jobs)
        for key in self.progress(done, desc=self.name, unit="part", total=len(mine), initial=len(mine) - len(missing)):
            results[key] = load_npz(self._part(key))  # a resumed run sees the same types
        for theirs in ranks.gather(results):
            results.update(theirs)
        seconds = {key: float(results[key].pop("_seconds")) for key in keys}
        return {key: results[key] for key in keys}, seconds

    def _finished(self, path: Path) -> dict | None:
        """The part that an earlier run finished, or None: not there, or damaged, which is said."""
        arrays = _undamaged(path, "_seconds")
        if arrays is not None:
            self._resumed[path.stem] = float(arrays["_seconds"])
        return arrays

    def _part(self, key: str) -> Path:
        return self._parts / f"{key}.npz"

    def save_checkpoint(self, key: str, arrays: dict) -> None:
        """Keep what part `key` has so far, should it be interrupted (not compressed: not for long)."""
        save_npz(self._parts / f"{key}.checkpoint.npz", arrays, np.savez)

    def load_checkpoint(self, key: str) -> dict | None:
        """What save_checkpoint(key) kept last, or None."""
        return _undamaged(self._parts / f"{key}.checkpoint.npz")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other process runs this experiment. Raises UserError if one does."""
        if ranks.RANK > 0:
            yield
            return
        message = f"{self.name} is running already, and writes to {relative(self.folder)}: wait for its end"
        with lock(self.folder / f"{self.name}.lock", message):
            try:
                yield
            finally:  # what a process that was killed did not finish writing
                for leftover in (*self.folder.glob(f".{self.name}.*.tmp"), *self._parts.glob(".*.tmp")):
                    leftover.unlink(missing_ok=True)

    @property
    def _parts(self) -> Path:
        return self.folder / f"{self.name}.parts"

    def configuration(self) -> dict:
        """What a result must agree on to be reused."""
        return _plain({"name": self.name, "settings": asdict(self.settings), "device": self.device.type})

    def _begun(self) -> bool:
        """Whether a run of this configuration was interrupted, with --fresh if there are results: it is continued."""
        manifest, mine = self._parts / "configuration.json", self.configuration()
        if self._parts.is_symlink() or not manifest.exists():
            return False
        saved = read_json(manifest)
        return {key: saved.get(key) for key in mine} == mine

    def open_parts(self) -> None:
        """Make the folder of finished parts, or check that the one there belongs to this configuration."""
        manifest = self._parts / "configuration.json"
        configuration = {**self.configuration(), "files": self.files, "threads": torch.get_num_threads()}
        if ranks.LOCAL_RANK == 0:
            if self._parts.is_symlink():
                raise UserError(f"{relative(self._parts)} is a link, which is not followed: remove it")
            if self.fresh and self._parts.exists():
                shutil.rmtree(self._parts)
            if manifest.exists():
                _check_configuration(manifest, read_json(manifest), configuration)
            else:
                write_text(manifest, json.dumps(configuration, indent=1))
        ranks.gather(None)  # nobody computes before the folder is there

    def close_parts(self) -> None:
        """Remove the finished parts: the results hold them now."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def outcome(self, experiment: Callable, replot: bool = False) -> tuple[Outcome | None, list[Path]]:
        """The experiment's Outcome, from disk if it is there and complete, and the result files' paths.

        On ranks other than 0 the Outcome is None. Raises UserError if the results on disk are of another configuration
        or damaged, and if there is nothing to replot.
        """
        json_path, npz_path = (self.folder / f"{self.name}.{suffix}" for suffix in ("json", "npz"))
        if replot and not json_path.exists():
            raise UserError(f"nothing to replot: {relative(json_path)} does not exist; run without --replot first")
        if ranks.first(json_path.exists() and (replot or not self.fresh and not self._begun())):
            if ranks.RANK > 0:
                return None, []
            record, outcome = read(json_path)
            if not replot:
                _check_configuration(json_path, record["configuration"], self.configuration())
            return outcome._replace(settings=self.settings), [json_path, npz_path]
        self.computed = True
        start = time.perf_counter()
        if hasattr(self.settings, "dataset"):
            self.data()  # a missing dataset is noticed before anything is written
        self.open_parts()
        outcome = experiment(self)
        if ranks.RANK > 0:
            return None, []
        outcome = outcome._replace(arrays={k: to_array(v) for k, v in outcome.arrays.items()})
        arrays = npz(outcome.arrays)
        record = self._record(outcome, time.perf_counter() - start, arrays)
        text = json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"
        write({npz_path: arrays, json_path: text.encode()})
        self.close_parts()
        # Read back, so that a fresh run and a replot draw from the same numbers.
        return read(json_path)[1]._replace(settings=self.settings), [json_path, npz_path]

    def _record(self, outcome: Outcome, seconds: float, arrays: bytes) -> dict:
        return {
            "configuration": self.configuration(),
            "dataset": {"label": self.label(), "sha256": self.files},
            "seeds": outcome.seeds,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "ranks": ranks.WORLD,
            "jobs": self.processes,
            "elapsed_seconds": seconds + sum(self._resumed.values()),
            "peak_memory_bytes": _peak_memory(),
            "git_commit": _git_commit(),
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
            "metrics": outcome.metrics,
            "timings": outcome.timings,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Reading


_FORM = {
    **dict.fromkeys(("configuration", "dataset", "versions", "metrics", "timings"), dict),
    "seeds": list,
    "device": str,
    "threads": int,
    "elapsed_seconds": float,
}


def read(json_path: Path) -> tuple[dict, Outcome]:
    """A results file as (record, Outcome). Raises UserError, naming the file, if it or its arrays are damaged."""
    record = read_json(json_path)
    if not all(isinstance(record.get(key), kind) for key, kind in _FORM.items()):
        raise UserError(f"{relative(json_path)} is corrupt: run with --fresh to make it again")
    npz_path = json_path.with_suffix(".npz")
    if not npz_path.exists():
        raise UserError(f"{relative(npz_path)} is missing beside its JSON: run with --fresh to make both again")
    if record.get("arrays_sha256") not in (None, hashlib.sha256(npz_path.read_bytes()).hexdigest()):
        raise UserError(f"{relative(npz_path)} is not the one that was written with its JSON: run with --fresh")
    metrics, timings = _with_nan(record["metrics"]), _with_nan(record["timings"])
    label = record["dataset"].get("label", "")
    return record, Outcome(metrics, load_npz(npz_path), record["seeds"], timings, label)


def _undamaged(path: Path, *keys: str) -> dict | None:
    """The arrays of a file that can be made again, or None: not there, or damaged, which is said."""
    if not path.exists():
        return None
    with contextlib.suppress(UserError):
        arrays = load_npz(path)
        if all(key in arrays for key in keys):
            return arrays
    print(f"{relative(path)} is damaged and is computed again", file=sys.stderr)
    return None


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return math.nan if value is None else value


def _check_configuration(path: Path, found: dict, wanted: dict) -> None:
    if found != wanted:
        difference = "; ".join(_differences(found, wanted))
        raise UserError(
            f"{relative(path)} was made with another configuration ({difference}): "
            "use --fresh to replace it, or --output to write elsewhere"
        )


def _differences(found: dict, wanted: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted({*found, *wanted}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} there, {b} now".removeprefix("settings.")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def to_array(value: Any) -> np.ndarray:
    """A tensor, number or array as a numpy array."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _plain(value: Any) -> Any:
    """Turn settings and metrics into what JSON can hold; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Where a result comes from


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, {model}, {os.cpu_count()} cores"


def _peak_memory() -> int | None:
    """The most memory that a process of this run has held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * (1 if sys.platform == "darwin" else 1024)


def _git_commit() -> str | None:
    """The commit that made the results, with "+" if files differed from it; None outside a git checkout."""
    try:

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=True, timeout=10
            ).stdout.strip()

        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return None
