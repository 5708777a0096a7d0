"""What adversarial_cifar.py records."""

import sys

import numpy as np
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import adversarial_cifar
from adversarial_cifar import ATTACKED, ATTACKS, MODELS


def test_figure_11_says_who_was_attacked(tiny):
    run = tiny("gradient-flow-symmetry/adversarial_cifar.py")[0]
    ((name, record),) = run.records.items()
    for attack in ATTACKS:
        by = dict(zip(ATTACKED, run.arrays[name][attack].swapaxes(0, 1)))  # (run, model, strength) each
        for others in ("itself", "expectation"):
            assert (by["strongest"] <= by[others]).all()
            assert (by[others][:, 0] == by["base"][:, 0]).all()  # the original is the base model
            assert (by[others][..., 0] == by["base"][..., 0]).all()  # without attack
        assert (by["strongest"] <= by["base"]).all()
        assert any((by["expectation"][:, 1] != by["itself"][:, 1]).flat)  # fresh elements are others
        for attacked in ATTACKED:
            assert f"{attack}_{attacked}" in record["metrics"] and attacked in run.stdout
    clean, *_, attacked = np.moveaxis(run.arrays[name]["FGSM"][:, 0, 0], -1, 0)
    assert (attacked < clean).all()


def test_the_models_of_the_claim_see_every_image_and_the_others_the_first(monkeypatch):
    s = adversarial_cifar.PRESETS["tiny"]
    seen = []

    def attack(target, models, *_):
        seen.append((len(target.x), list(models)))
        return ()

    class Run:
        settings, device = s, torch.device("cpu")

        @staticmethod
        def data():
            class Data:
                x, y, shape = torch.rand(100, 16), torch.arange(100) % 10, (1, 4, 4)
                x_test, y_test = torch.rand(70, 16), torch.arange(70) % 10

            return Data

        @staticmethod
        def progress(iterable, **_):
            return iterable

    monkeypatch.setattr(adversarial_cifar, "attack_as_controls", attack)
    monkeypatch.setattr(adversarial_cifar, "attack_as_published", attack)
    monkeypatch.setattr(adversarial_cifar, "stack_models", lambda *_: torch.zeros(len(MODELS), 1))
    adversarial_cifar.measure(Run, 0)
    controls, published = seen[:-1], seen[-1:]
    assert published == [(s.control_samples, list(MODELS))]
    assert controls[0] == (s.control_samples, list(MODELS)) and sum(n for n, _ in controls) == s.samples
    assert all(models == ["original", "group"] for _, models in controls[1:])
