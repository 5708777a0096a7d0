"""What adversarial_cifar.py records."""


def test_figure_11_says_who_was_attacked(tiny):
    run = tiny("gradient-flow-symmetry/adversarial_cifar.py")[0]
    ((name, record),) = run.records.items()
    for attack in ("FGSM", "PGD"):
        base, itself, either, published = run.arrays[name][attack].swapaxes(0, 1)
        assert (base[:, 0] == itself[:, 0]).all()  # the original is the base model
        assert (either <= base).all() and (either <= itself).all()
        assert (base[..., 0] == itself[..., 0]).all() and (base[..., 0] == published[..., 0]).all()
        for attacked in ("base model", "itself", "either", "published"):
            assert f"{attack}/{attacked.replace(' ', '_')}" in record["metrics"]
            assert attacked in run.stdout
    assert (run.arrays[name]["FGSM"][:, 0, 0, -1] < run.arrays[name]["FGSM"][:, 0, 0, 0]).all()
