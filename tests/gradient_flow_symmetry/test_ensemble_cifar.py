"""What ensemble_cifar.py records."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import symmetry_ensemble as se


def test_figure_10_records_exactness_on_the_batch_and_change_on_new_samples(tiny):
    run = tiny("gradient-flow-symmetry/ensemble_cifar.py")[0]
    ((name, record),) = run.records.items()
    arrays, settings = run.arrays[name], record["configuration"]["settings"]
    moderate = [i for i, epsilon in enumerate(settings["epsilons"]) if epsilon <= 1]
    own, new = (arrays[f"change_on_{where}"][:, se.ARMS.index("group"), moderate] for where in ("batch", "new"))
    assert own.max() <= 1e-9 and new.min() > 1e-3
    assert record["metrics"]["change_on_batch"]["0.1"] == own.max()
    assert "own batch" in run.stdout and "new samples" in run.stdout
    sizes = settings["sizes"]
    own = arrays["size_change_on_batch"]
    assert own[:, :, [size <= se.HIDDEN for size in sizes]].max() <= 1e-9
    assert ((0 <= arrays["accuracy"]) & (arrays["accuracy"] <= 1)).all()
    assert arrays["accuracy"].shape == (2, len(se.ARMS), len(settings["epsilons"]), len(settings["elements"]))
