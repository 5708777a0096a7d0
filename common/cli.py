"""What the user types: the command line that every script shares.

A script is a claim, settings, experiment, judge, figures and table, and one call:

    CLAIM = Claim(...)                     # what the paper says and the rule that judges it: common/claims.py

    @dataclass(frozen=True)
    class Settings:
        dataset: str = "MNIST"             # only if the script has datasets: adds --dataset
        seeds: int = 5                     # only if the script has seeds: adds --seeds
        ...

    PAPER = Settings()
    PRESETS = {"tiny": replace(PAPER, ...), "quick": replace(PAPER, ...), "paper": PAPER}

    def experiment(run): ...               # run.settings, run.data(), run.parts(...) -> Outcome: common/run.py
    def judge(outcome): ...                # -> Verdict; a script with several datasets takes as many outcomes
    def plot(outcome, settings, save): ... # save(figure) or save(figure, "suffix") writes PDF and PNG
    def report(outcome, settings): ...     # the closing table, a string

    if __name__ == "__main__":
        cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)

A script may offer choices of its own: main(..., options={"method": ("closed-form", "shapely")}) adds --method, which
sets the Settings field `method`; anything but the preset's value becomes part of the results' and figures' names.
Results go to results/ (preset `paper`) or results/<preset>/, figures to figures/ likewise; --output moves both folders.
"""

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from common import ROOT, UserError, jobs, plots, ranks, terminal
from common import data as datasets
from common.files import relative, whole
from common.run import Outcome, Run

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main(
    script: str,
    description: str,
    presets: dict,
    experiment: Callable,
    plot: Callable,
    report: Callable,
    judge: Callable,
    options: dict | None = None,
    argv: list[str] | None = None,
    name: str | None = None,
    links: str | None = None,
) -> None:
    """Parse the command line, run or reuse the experiment, draw, print. Exits with 2 on a user's mistake.

    options: {Settings field: its choices}, the script's own command line options. name: of the results and figures
    (default: the script's; two scripts that share a name in two folders need one). links: a second folder, relative to
    the repository, for symbolic links to the figures.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = name or Path(script).stem
    guard(lambda: _main(name, description, presets, experiment, plot, report, judge, options or {}, links, argv))


def guard(function: Callable[[], None]) -> None:
    """Call function(); a user's mistake becomes one line and exit status 2, a full disk 1, an interrupt 130."""
    terminal.accept_any_symbol()
    try:
        ranks.start()
        try:
            function()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _complain(error)
        sys.exit(error.status)
    except BrokenPipeError:  # whoever read the output has had enough
        terminal.forget_output()
        sys.exit(1)
    except OSError as error:
        full = error.errno in _NO_ROOM
        where = f"{relative(error.filename)}: " if error.filename else ""
        hint = "; make room and run the same command again: what is finished is kept" if full else ""
        _complain(f"{where}{error.strerror or error}{hint}")
        terminal.forget_output()
        sys.exit(1 if full else 2)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    finally:
        ranks.stop()


def _main(name, description, presets, experiment, plot, report, judge, own_options, links, argv) -> None:  # noqa: ANN001
    start = time.perf_counter()
    options = _parser(description, presets, own_options).parse_args(argv)
    _settle(options.threads)
    output = options.output or ROOT
    subfolder = "" if options.preset == "paper" else options.preset
    outcomes = []
    for run in _runs(name, presets[options.preset], own_options, options, output / "results" / subfolder):
        with run.alone():
            outcome, files = run.outcome(experiment, options.replot)
            if ranks.RANK > 0:
                continue
            outcomes.append(outcome)
            with _reading(run, files):
                files += _draw(run, outcome, plot, output / "figures" / subfolder, links and output / links / subfolder)
                if not options.quiet:
                    print(report(outcome, run.settings))
                    reused = "" if run.computed else " (results reused; --fresh computes them again)"
                    print("\nfiles: " + ", ".join(relative(f) for f in files) + reused)
    if not options.quiet and ranks.RANK == 0:
        with _reading(run, files):
            verdict = judge(*outcomes)
        look = "" if options.preset == "paper" else " (a first look, not the paper's size)"
        print(f"verdict{look}: {verdict}. {verdict.sentence}")
        print(f"{time.perf_counter() - start:.1f} s")


def _reading(run: Run, files: list[Path]) -> contextlib.AbstractContextManager:
    """Results from disk may be damaged in any way; in those just computed an error is the script's own."""
    return contextlib.nullcontext() if run.computed else whole(files[0])


def _draw(run: Run, outcome: Outcome, plot: Callable, figures: Path, links: Path | None) -> list[Path]:
    """Draw the figures, and links to them in a second folder if there is one; return the figures' paths."""
    drawn = []

    def save(figure: Any, suffix: str = "") -> None:
        paths = plots.save(figure, figures, run.name + (f"_{suffix}" if suffix else ""))
        drawn.extend(paths)
        if links:
            plots.link(paths, links)

    plot(outcome, run.settings, save)
    return drawn


def _runs(name: str, settings: Any, own_options: dict, options: argparse.Namespace, folder: Path) -> list[Run]:
    """One Run per dataset chosen (one in all for a script without datasets)."""
    own = {k: v for k in own_options if (v := getattr(options, k)) not in (None, getattr(settings, k))}
    settings = replace(settings, **own)
    if getattr(options, "seeds", None) is not None:
        settings = replace(settings, seeds=options.seeds)
    chosen = [getattr(settings, "dataset", None)]
    if getattr(options, "dataset", None):
        chosen = _present(options.data_dir) if options.dataset == "all" else [options.dataset]
    return [
        Run(
            name="_".join([name, *([dataset] if dataset else []), *own.values()]),
            settings=replace(settings, dataset=dataset) if dataset else settings,
            device=_device(options.device),
            folder=folder,
            data_dir=options.data_dir,
            quiet=options.quiet or ranks.RANK > 0,
            fresh=options.fresh,
            jobs=_jobs(options.jobs),
        )
        for dataset in chosen
    ]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError: argparse prints its usage first; one line is the rule here."""
        raise UserError(message)


def _parser(description: str, presets: dict, own_options: dict) -> Parser:
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
    parser.add_argument("--threads", type=_positive, help="of one process (default: OMP_NUM_THREADS, or 1)")
    parser.add_argument("--jobs", type=_positive, help="processes that share the work (default: one for each core)")
    parser.add_argument("--replot", action="store_true", help="draw saved results again, compute nothing")
    parser.add_argument("--fresh", action="store_true", help="start over: discard saved results of this preset")
    parser.add_argument("--output", type=Path, help="where figures/ and results/ go (default: the repository)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.LOCAL_RANK % torch.cuda.device_count())


def _settle(threads: int | None) -> None:
    """Settle all that the environment could change in the numbers.

    One thread, unless told otherwise: these matrices are small, and beside other work their threads would mostly wait
    for each other. More cores are used by more processes.
    """
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)


def _jobs(wanted: int | None) -> int:
    if (wanted or 1) > 1 and not jobs.possible():
        raise UserError("--jobs needs --threads 1, Linux, no GPU and no ranks: use --jobs 1, or --threads, or torchrun")
    return wanted or jobs.cores()


def _present(data_dir: Path | None) -> list[str]:
    """The full-size datasets found in data_dir; those that are missing are named on stderr."""
    present, errors = [], []
    for name in datasets.FULL_SIZE:
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


def _complain(error: object) -> None:
    if ranks.RANK == 0:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
