"""How long each script takes at a preset, in seconds and CPU-seconds: by itself, and beside two busy loops.

    python benchmarks/scripts.py                             # all of them, at quick; an idle machine, 15 minutes
    python benchmarks/scripts.py correlation.py --preset tiny

The scripts run as they do by default: one thread, a process for each core. `make figures` runs two at a time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*-*/*.py")])
    if "\n    cli.main(" in path.read_text(encoding="utf-8")
]
LIMIT = 900  # seconds, beyond which a run is stopped


@contextmanager
def busy_loops(number):
    """Other work on this machine, for as long as the context lasts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(script, preset):
    """Seconds and CPU-seconds of one run of a script and its processes; None where it takes longer than LIMIT."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--preset", preset, "--quiet", "--output", folder]
        before, start = sum(os.times()[2:4]), time.perf_counter()
        try:
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return None
        return time.perf_counter() - start, sum(os.times()[2:4]) - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="SCRIPT")
    parser.add_argument("--preset", default="quick")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, preset {options.preset}; seconds / CPU-seconds\n")
    width = max(map(len, options.scripts))
    print("".ljust(width), "alone".rjust(16), "two busy loops".rjust(16), "CPU ratio".rjust(10))
    totals = [0.0, 0.0]
    for script in options.scripts:
        times = []
        for loops in (0, 2):
            with busy_loops(loops):
                times.append(measure(script, options.preset))
        totals = [total + (t[0] if t else LIMIT) for total, t in zip(totals, times)]
        cells = [f"{t[0]:.1f} / {t[1]:.1f}" if t else f"> {LIMIT}" for t in times]
        ratio = f"{times[1][1] / times[0][1]:.2f}" if all(times) else ""
        print(script.ljust(width), *(cell.rjust(16) for cell in cells), ratio.rjust(10), flush=True)
    print("all, seconds".ljust(width), *(f"{total:.0f}".rjust(16) for total in totals))


if __name__ == "__main__":
    main()
