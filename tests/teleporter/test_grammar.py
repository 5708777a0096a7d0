"""Any module: random ones of a grammar keep their function, are refused or left alone; planted bugs are seen."""

import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import set_seed
from grammar import built

from teleporter import classes, finder, layers, products, symmetry, teleporter, tracing
from teleporter.verify import relative_change, tensors_of

MODELS, SOME = 510, 120


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(model, inputs):
    with torch.no_grad():
        found = []
        for x in inputs:
            set_seed(7)  # dropout
            found += tensors_of(model(x))
        return found


def element(s):
    if s.kind == "rescale":
        return torch.randn(s.shape).sign()
    T = s.tangent(torch.randn(s.shape))
    return T / torch.linalg.matrix_norm(T, ord=2)[:, None, None]


def checked(number, how):
    """Build a model, move it by e^±1 on every symmetry; returns their kinds, None if it is refused.

    how: "graph", what torch.fx shows without inputs; "run", what a run of the inputs shows; "search", the graph with
    shapes taken as usual, where the run found the same channels.
    """
    model, x, other = built(number)
    state, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    try:
        found = teleporter.Teleporter(model, inputs=None if how == "graph" else x)
    except ValueError as error:
        assert "no symmetry found" in str(error)
        return None
    finally:
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    refuted = {name: reason for name, reason in found.left_alone.items() if "a trial" in reason}
    assert not refuted, refuted
    symmetries = found.symmetries
    before = outputs(model, (x, other))
    if how == "search":
        same = {(s.name, s.shape) for s in symmetries}
        symmetries = [s for s in usual(model) if (s.name, s.shape) in same]
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for s in symmetries:
                s.act_(parameters, element(s))
    else:
        found.apply([element(s) for s in symmetries])
    change = relative_change(before, outputs(model, (x, other)))
    assert change <= 1e-10, f"{change:.2g}: {[s.name for s in symmetries]}"
    return Counter(s.kind for s in symmetries)


def usual(model):
    found = finder.Finder(model)
    found.search()
    return [s for s, modules, reason in found.spaces + found.heads if not (reason or found.obstacle(s.slots, modules))]


@pytest.mark.parametrize("part", range(3))
def test_random_models_keep_their_function_or_are_refused_or_left_alone(part):
    kinds, moved = Counter(), 0
    for number in range(part * MODELS // 3, (part + 1) * MODELS // 3):
        how = ("graph", "run")[number % 2]
        found = checked(number, how)
        kinds.update(found or {"refused": 1})
        moved += how == "run" and bool(found)
    assert moved > 0.3 * MODELS / 3 and all(kinds[kind] > 5 for kind in ("rescale", "attention", "linear", "refused"))


# Single bugs: (module, what stands there, what stands there instead)
BUGS = {
    "transposed": (layers, "size or len(x)).movedim(1, 0).unsqueeze(0)", "size or len(x)).unsqueeze(0)"),
    "positions for channels": (layers, "(size, -1)) if channels_first", "(size, -1)) if not channels_first"),
    "wrong axis": (layers, "(groups, -1)).movedim(2, 1)", "(groups, -1))"),
    "heads for features": (layers, "(heads, -1, d)).movedim(2, 1)", "(-1, d, heads)).movedim(0, 1)"),
    "missing bias": (layers, '[("weight", rows), ("bias", rows)]', '[("weight", rows)]'),
    "missing bias of ConvTranspose": (layers, 'grouped(module.groups)), ("bias", rows)]', "grouped(module.groups))]"),
    "missing bias of attention": (layers, ', ("out_proj.bias", rows)]', "]"),
    "missing gain": (layers, 'return [("weight", rows), ("bias", rows)]', 'return [("bias", rows)]'),
    "rows for columns": (layers, "if kind in CONV else rows", "if kind in CONV_TRANSPOSE else rows"),
    "queries for keys": (layers, "columns(part * size, size)", "columns(0, size)"),
    "an activation": (layers, "|neg|abs", "|neg|abs|gelu|tanh|silu|relu6"),
    "a skipped writer or reader": (layers, "self.slots += other.slots", "pass"),
    "any clamp": (layers, '(((0,), {}), ((), {"min": 0}))', '(((0,), {}), ((), {"min": 0}), ((0, 0.5), {}))'),
    "squares": (layers, "and not (args[1] in flows or kwargs)", "and not kwargs"),
    "several scales a channel": (layers, "module.weight is None or module.weight.ndim > 1", "module.weight is None"),
    "a scaled norm": (layers, "and module.max_norm is None", ""),
    "wrong inverse": (symmetry, "dual = T.exp(), (-T).exp()", "dual = T.exp(), T.exp()"),
    "untransposed inverse": (symmetry, "torch.linalg.matrix_exp(-T).mT", "torch.linalg.matrix_exp(-T)"),
    "a sum that joins nothing": (classes, "self.join(p, q, reason)\n        return", "pass\n        return"),
    "an unseen bias": (
        products,
        'self.classes.unify(labels, self.of(bias), f"{self.place} adds what is not scaled")', "labels",
    ),
}  # fmt: skip


def plant(monkeypatch, module, old, new):
    """Run a module's source with a bug in it, and let all of the library use what it defines."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    planted, original = types.ModuleType(module.__name__), dict(vars(module))
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(planted))
    for key, value in original.items():  # classes keep their identity, for those that inherit
        if isinstance(value, type) and value.__module__ == module.__name__:
            for method, function in vars(vars(planted)[key]).items():
                if callable(function) and not method.startswith("__"):
                    monkeypatch.setattr(value, method, function)
            original[key] = vars(planted)[key] = value
    for name in [name for name in sys.modules if name.partition(".")[0] == "teleporter"]:
        for key, value in list(vars(sys.modules[name]).items()):
            if not key.startswith("__") and key in original and value is original[key]:
                monkeypatch.setattr(sys.modules[name], key, vars(planted)[key])


def first_failure(ways):
    for how in ways:
        for number in range(SOME):
            try:
                checked(number, how)
            except Exception:  # a crash is seen as well
                return number, how
    return None


@pytest.mark.parametrize("bug", BUGS)
def test_every_bug_is_seen(bug, monkeypatch):
    plant(monkeypatch, *BUGS[bug])
    assert first_failure(["run"] if BUGS[bug][0] in (tracing, products, classes) else ["graph", "search"])
