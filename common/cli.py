"""The command line, presets and results that every script shares.

A script is settings, experiment, plot, report, and one call:

    @dataclass(frozen=True)
    class Settings:
        dataset: str = "mnist-mini"        # only if the script has datasets: adds --dataset
        seeds: int = 5                     # only if the script has seeds: adds --seeds
        ...

    PRESETS = {"tiny": Settings(...), "quick": Settings(...), "paper": Settings(dataset="MNIST", ...)}

    def experiment(run):                   # run.settings, run.device, run.data(), run.parts(function, keys)
        parts = run.parts(train, ["Adam", "SGD"])            # {key: arrays}; finished keys are not computed again
        return Outcome(metrics={...}, arrays={...}, seeds=[...], timings={...})

    def plot(outcome, settings, save): ...  # save(figure) or save(figure, "suffix") writes PDF and PNG
    def report(outcome, settings): ...      # the closing table, a string: see `table`

    if __name__ == "__main__":
        cli.main(__file__, __doc__, PRESETS, experiment, plot, report)

A script may offer choices of its own: main(..., options={"method": ("closed-form", "shapely")}) adds --method, which
sets the Settings field `method`; anything but the preset's value becomes part of the results' and figures' names.

One JSON and one NPZ per experiment go to results/ (preset `paper`) or results/<preset>/, one PDF and one PNG per
figure to figures/ likewise; --output moves both folders. Arrays are deterministic; everything that a clock measured
goes to the JSON, under "timings". A finished part is kept in results/.../<name>.parts/ until the experiment is
complete, so that an interrupted run continues; everything is written to a temporary name first and renamed. Under
torchrun the ranks divide the parts among themselves (common/ranks.py) and rank 0 writes the results.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import ROOT, UserError, ranks
from common import data as datasets


class Outcome(NamedTuple):
    """What an experiment returns, and what plot and report get back (also from disk)."""

    metrics: dict  # JSON-able numbers; tensors and arrays become lists, NaN and infinities null
    arrays: dict  # name -> numpy array or tensor: deterministic (same seed, machine, threads: same bits)
    seeds: list = []  # the actual seeds
    timings: dict = {}  # seconds, anything a clock measured
    label: str = ""  # the dataset's name as figures show it (filled in from the data)


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
    computed: bool = False  # False: the results were on disk
    files: dict = field(default_factory=dict)  # dataset files read -> SHA-256
    _data: dict = field(default_factory=dict)
    _seconds: dict = field(default_factory=dict)
    _resumed: list = field(default_factory=list)  # keys of parts that an earlier, interrupted run had finished

    def data(self, name=None):
        """The Dataset called `name` (default: the settings' dataset), on the run's device."""
        name = name or self.settings.dataset
        if name not in self._data:
            self._data[name] = datasets.load(name, self.data_dir, self.device)
            self.files.update(self._data[name].files)
        return self._data[name]

    def label(self):
        return ", ".join(data.label for data in self._data.values())

    def progress(self, iterable=None, **options):
        """A tqdm bar that appears after two seconds, and never with --quiet."""
        return tqdm(iterable, **{"delay": 2, "disable": self.quiet, "leave": False, "dynamic_ncols": True, **options})

    def parts(self, function, keys):
        """Return {key: function(key)} for string keys; function returns a dict of arrays (or numbers).

        Each finished part is saved at once; a rerun of the same configuration computes only the missing ones.
        run.seconds(key) tells how long a part took, in whichever run computed it.
        """
        results, keys = {}, list(keys)
        for key in self.progress(keys[ranks.RANK :: ranks.WORLD], desc=self.name, unit="part"):
            path = self._parts / f"{key}.npz"
            if path.exists():
                self._resumed.append(key)
            else:
                start = time.perf_counter()
                arrays = {k: _array(v) for k, v in function(key).items()}
                _save_npz(path, {**arrays, "_seconds": np.float64(time.perf_counter() - start)})
            results[key] = _load_npz(path)  # what was just saved too: a resumed run sees the same types
        for theirs in ranks.gather(results):
            results.update(theirs)
        self._seconds.update({key: float(results[key].pop("_seconds")) for key in keys})
        return {key: results[key] for key in keys}

    def save_checkpoint(self, key, arrays):
        """Keep what function(key) of `parts` has so far, should it be interrupted (not compressed: not for long)."""
        _save_npz(self._parts / f"{key}.checkpoint.npz", arrays, np.savez)

    def load_checkpoint(self, key):
        """What save_checkpoint(key) kept last, or None."""
        path = self._parts / f"{key}.checkpoint.npz"
        return _load_npz(path) if path.exists() else None

    def seconds(self, key):
        return self._seconds[key]

    def resumed_seconds(self):
        return sum(self._seconds[key] for key in self._resumed)

    @property
    def _parts(self):
        return self.folder / f"{self.name}.parts"

    def configuration(self):
        return _plain({"name": self.name, "settings": asdict(self.settings), "device": self.device.type})

    def open_parts(self):
        """Make the folder of finished parts, or check that the one there belongs to this configuration."""
        manifest = self._parts / "configuration.json"
        configuration = {**self.configuration(), "files": self.files}
        if ranks.LOCAL_RANK == 0:
            if self.fresh and self._parts.exists():
                shutil.rmtree(self._parts)
            if manifest.exists():
                _check_configuration(manifest, json.loads(manifest.read_text()), configuration)
            else:
                _write_text(manifest, json.dumps(configuration, indent=1))
        ranks.gather(None)  # nobody computes before the folder is there

    def close_parts(self):
        shutil.rmtree(self._parts, ignore_errors=True)


def main(script, description, presets, experiment, plot, report, options=None, argv=None, name=None, links=None):
    """Parse the command line, run or reuse the experiment, draw, print the table. Exits with 2 on a user's mistake.

    options: {Settings field: its choices}, the script's own command line options. name: of the results and figures
    (default: the script's; two scripts that share a name in two folders need one). links: a second folder, relative to
    the repository, for symbolic links to the figures.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = name or Path(script).stem
    guard(lambda: _main(name, description, presets, experiment, plot, report, options or {}, links, argv))


def guard(function):
    """Call function(); a user's mistake becomes one line and exit status 2, an interrupt a hint and 130."""
    try:
        ranks.start()
        function()
    except UserError as error:
        sys.exit(_complain(error))
    except OSError as error:  # a full disk, a read-only folder
        sys.exit(_complain(f"{error.strerror or error}: {error.filename}" if error.filename else error))
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    finally:
        ranks.stop()


def _main(name, description, presets, experiment, plot, report, own_options, links, argv):
    start = time.perf_counter()
    options = _parser(description, presets, own_options).parse_args(argv)
    settings = presets[options.preset]
    own = {k: v for k in own_options if (v := getattr(options, k)) not in (None, getattr(settings, k))}
    settings = replace(settings, **own)
    if getattr(options, "seeds", None) is not None:
        settings = replace(settings, seeds=options.seeds)
    chosen = [getattr(settings, "dataset", None)]
    if getattr(options, "dataset", None):
        chosen = _present(options.data_dir) if options.dataset == "all" else [options.dataset]
    output = Path(options.output) if options.output else ROOT
    subfolder = "" if options.preset == "paper" else options.preset
    for dataset in chosen:
        run = Run(
            name="_".join([name, *([dataset] if dataset else []), *own.values()]),
            settings=replace(settings, dataset=dataset) if dataset else settings,
            device=_device(options.device),
            folder=output / "results" / subfolder,
            data_dir=options.data_dir,
            quiet=options.quiet or ranks.RANK > 0,
            fresh=options.fresh,
        )
        outcome, files = _outcome(run, experiment, options.replot)
        if ranks.RANK > 0:
            continue
        figures = output / "figures" / subfolder

        def save(figure, suffix="", name=run.name, figures=figures, files=files):
            paths = save_figure(figure, figures, name + (f"_{suffix}" if suffix else ""))
            files += paths
            if links:
                _link(paths, output / links / subfolder)

        plot(outcome, run.settings, save)
        if not options.quiet:
            print(report(outcome, run.settings))
            reused = "" if run.computed else " (results reused; --fresh computes them again)"
            print("\nfiles: " + ", ".join(_relative(f) for f in files) + reused)
    if not options.quiet and ranks.RANK == 0:
        print(f"{time.perf_counter() - start:.1f} s")


def _outcome(run, experiment, replot):
    """The experiment's Outcome, from disk if it is there and complete, and the result files' paths."""
    json_path, npz_path = run.folder / f"{run.name}.json", run.folder / f"{run.name}.npz"
    if replot and not json_path.exists():
        raise UserError(f"nothing to replot: {_relative(json_path)} does not exist; run without --replot first")
    if ranks.first(json_path.exists() and (replot or not run.fresh)):
        if ranks.RANK > 0:
            return None, []
        record = _read_record(json_path)
        if not replot:
            _check_configuration(json_path, record["configuration"], run.configuration())
        if not npz_path.exists():
            raise UserError(f"{_relative(npz_path)} is missing beside its JSON: run with --fresh to make both again")
        return _read(record, npz_path), [json_path, npz_path]
    start = time.perf_counter()
    run.computed = True
    if hasattr(run.settings, "dataset"):
        run.data()  # a missing dataset is noticed before anything is written
    run.open_parts()
    outcome = experiment(run)
    if ranks.RANK > 0:
        return None, []
    outcome = outcome._replace(arrays={k: _array(v) for k, v in outcome.arrays.items()})
    record = {
        "configuration": run.configuration(),
        "dataset": {"label": run.label(), "sha256": run.files},
        "seeds": outcome.seeds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": device_name(run.device),
        "threads": torch.get_num_threads(),
        "ranks": ranks.WORLD,
        "elapsed_seconds": time.perf_counter() - start + run.resumed_seconds(),
        "peak_memory_bytes": _peak_memory(),
        "git_commit": _git_commit(),
        "metrics": outcome.metrics,
        "timings": outcome.timings,
    }
    _save_npz(npz_path, outcome.arrays)
    _write_text(json_path, json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    run.close_parts()
    # Read back, so that a fresh run and a replot draw from the same numbers.
    return _read(_read_record(json_path), npz_path), [json_path, npz_path]


def read(json_path):
    """A results file as (record, Outcome), for whoever reports on it."""
    record = _read_record(json_path)
    return record, _read(record, json_path.with_suffix(".npz"))


def _read(record, npz_path):
    label = record["dataset"]["label"]
    return Outcome(record["metrics"], _load_npz(npz_path), record["seeds"], record["timings"], label)


def table(header, rows):
    """A plain text table: first column left, the others right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def save_figure(figure, folder, name):
    """Write name.pdf and name.png into folder, atomically and without dates; close the figure; return the paths."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = folder / f"{name}.{suffix}"
        figure.savefig(path.with_suffix(f".tmp.{suffix}"), metadata=metadata)
        path.with_suffix(f".tmp.{suffix}").replace(path)
        paths.append(path)
    plt.close(figure)
    return paths


def _link(paths, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        temporary = folder / (path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(path.resolve(), folder.resolve()))
        temporary.replace(folder / path.name)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, {model}, {os.cpu_count()} cores"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message):  # argparse prints its usage first; one line is the rule here
        raise UserError(message)


def _parser(description, presets, own_options):
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = presets["quick"]
    names = {f.name for f in fields(default)}
    parser.add_argument("--preset", choices=list(presets), default="quick", help="size of the run (default: quick)")
    if "dataset" in names:
        parser.add_argument("--dataset", choices=[*datasets.NAMES, "all"], help="default: the preset's")
        parser.add_argument("--data-dir", type=Path, help="folder that holds the datasets (default: data/)")
    else:
        parser.set_defaults(data_dir=None)
        parser.add_argument("--data-dir", help=argparse.SUPPRESS)  # accepted everywhere, for one loop over all scripts
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    if "seeds" in names:
        parser.add_argument("--seeds", type=_positive, help="number of seeds (default: the preset's)")
    for name, choices in own_options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", choices=choices, help="default: the preset's")
    parser.add_argument("--replot", action="store_true", help="draw saved results again, compute nothing")
    parser.add_argument("--fresh", action="store_true", help="start over: discard saved results of this preset")
    parser.add_argument("--output", type=Path, help="where figures/ and results/ go (default: the repository)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.LOCAL_RANK % torch.cuda.device_count())


def _present(data_dir):
    """The full-size datasets found in data_dir; those that are missing are named on stderr."""
    present, errors = [], []
    for name in datasets.DOWNLOADS:
        try:
            datasets.locate(name, data_dir)
            present.append(name)
        except UserError as error:
            errors.append(error)
    for error in errors if present else ():
        print(f"skipped: {error}", file=sys.stderr)
    if not present:
        raise errors[0]
    return present


def _check_configuration(path, found, wanted):
    if found != wanted:
        difference = "; ".join(_differences(found, wanted))
        raise UserError(
            f"{_relative(path)} was made with another configuration ({difference}): "
            "use --fresh to replace it, or --output to write elsewhere"
        )


def _differences(found, wanted, prefix=""):
    for key in sorted({*found, *wanted}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} there, {b} now".removeprefix("settings.")


def _read_record(path):
    try:
        record = json.loads(path.read_text())
        all(record[key] is not None for key in ("configuration", "metrics", "seeds", "timings", "dataset"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{_relative(path)} is corrupt: run with --fresh to make it again") from None
    return record


def _plain(value):
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


def _array(value):
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _save_npz(path, arrays, save=np.savez_compressed):
    if bad := [k for k, v in arrays.items() if np.asarray(v).dtype == object]:
        raise TypeError(f"arrays that would need pickle: {bad}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        save(file, **arrays)
    temporary.replace(path)


def _load_npz(path):
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"{_relative(path)} is corrupt ({error}): run with --fresh to make it again") from None


def _write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _peak_memory():
    """The most memory that this process has held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _git_commit():
    """The commit that made the results, with "+" if files differed from it; None outside a git checkout."""
    try:

        def git(*arguments):
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()

        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _relative(path):
    """Relative to the current folder where possible: shorter to read, and no absolute path in messages."""
    return os.path.relpath(path)


def _complain(error):
    if ranks.RANK == 0:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
