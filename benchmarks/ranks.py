"""Does dividing a run over processes pay? Seconds with 1 and with 2 ranks, and whether the arrays are the same bits.

    python benchmarks/ranks.py [SCRIPT ...]     # at their default preset, on this machine

One rank has all threads, as a plain run does; with the threads that two ranks have each (one on two cores) it must give
the same arrays, so it runs twice.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gradient-flow-symmetry/Q_dynamics_elementwise.py", "teleport_optimization.py")


def run(script, ranks, threads, output):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", script, "--quiet"]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "--output", output], cwd=ROOT, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    return seconds, {path.name: path.read_bytes() for path in Path(output).rglob("*.npz")}


def main():
    cores = os.cpu_count()
    each = max(1, cores // 2)
    for script in sys.argv[1:] or SCRIPTS:
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c:
            plain, _ = run(script, 1, cores, a)
            one, arrays = run(script, 1, each, b)
            two, same = run(script, 2, each, c)
        print(
            f"{script}: 1 rank {plain:.1f} s ({cores} threads), {one:.1f} s ({each} threads); 2 ranks {two:.1f} s "
            f"({each} threads each), ratio {two / plain:.2f}; arrays {'identical' if arrays == same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
