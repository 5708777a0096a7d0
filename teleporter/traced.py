"""Symmetries from a trace: which classes of labels are free, where they stand in the parameters, which of them mix."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from teleporter.classes import FIXED, Classes
from teleporter.passes import kept_attributes, same_randomness
from teleporter.rotations import RotarySymmetry, still_gains
from teleporter.symmetry import Candidate, Entries, Rows, Symmetry
from teleporter.tracing import Tracer
from teleporter.verify import called

Places = Sequence[Tensor]  # what each number of a parameter writes, and what it reads
Keys = dict[int, tuple[frozenset, str]]  # of `_keys`


def traced(model: nn.Module, inputs: Any) -> list[Candidate]:
    """Candidates (symmetry, None, reason against it or None) of one forward pass of real inputs.

    Raises whatever the model raises.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    tracer = Tracer(model, parameters)
    with same_randomness(model), kept_attributes(model), _kept_parameters(model):
        with tracer.running():
            output = called(model, inputs)
        for x in tree_leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output):
            tracer.fix(x, "it is the output of the model")
            tracer.streams.end(x)
    labels = {name: _labels(tracer, name) for name, uses in tracer.uses.items() if uses}
    tracer.classes.settle()
    places = {
        name: [_compressed(_roots(tracer.classes, _compressed(x))) for x in pair] for name, pair in labels.items()
    }
    found, names = [], set()
    others = _candidates(tracer, places, labels, list(parameters))
    scaled = {id(parameters[slot.name]) for s, _, reason in others if not reason for slot in s.slots}
    streams = [
        (
            s,
            modules,
            reason or ("what it writes is read through gains that scale" if still_gains([s]) & scaled else None),
        )
        for s, modules, reason in tracer.streams.candidates(list(parameters))
    ]
    for symmetry, modules, reason in [*others, *streams]:
        name = symmetry.name
        while name in names:  # two spaces between the same modules
            name += "'"
        names.add(name)
        found.append((symmetry._replace(name=name), modules, reason))
    rotating = {_module(slot.name) for s, _, reason in streams if not reason for slot in s.slots if not slot.reads}
    return found + [c for c in _left_alone(tracer, places, labels) if c[0].name not in rotating]


@contextmanager
def _kept_parameters(model: nn.Module) -> Iterator[None]:
    """Weights that the forward pass itself writes, as an embedding's max_norm does, are taken back."""
    before = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, version, value in before:
                if p._version != version:
                    p.copy_(value)


def _left_alone(tracer: Tracer, places: Mapping[str, Places], labels: Mapping[str, Places]) -> list[Candidate]:
    """One candidate, with its reason, for each module that has parameters of which nothing moves as a writer."""
    reasons, moving = {}, {_module(name) for name, (write, _) in places.items() if (write != FIXED).any()}
    for name in tracer.parameters:
        if name not in places:
            reason = "it is not used in this forward pass"
        elif name in tracer.fixed:
            reason = tracer.fixed[name]
        else:
            written = labels[name][0].flatten()
            reason = tracer.classes.why(int(written[(written != FIXED).to(torch.uint8).argmax()]))
        if _module(name) not in moving:
            reasons.setdefault(_module(name), reason)
    return [(Symmetry(name, "rescale", (0,), ()), None, reason) for name, reason in reasons.items()]


def _labels(tracer: Tracer, name: str) -> list[Tensor]:
    """Labels that each number of a parameter writes and reads, of the parameter's shape."""
    p = tracer.parameters[name]
    (first, *others) = tracer.uses[name]
    both = [torch.full((p.numel(),), FIXED, device=p.device) for _ in range(2)]
    seen = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
    for index, *labels in (first, *others):
        new = ~seen[index]
        for whole, own in zip(both, labels):
            whole[index[new]] = own[new]
            tracer.classes.unify(whole[index], own, f"{name} is used in more than one way")
        seen[index] = True
    return [x.view(p.shape) for x in both]


def _roots(classes: Classes, labels: Tensor) -> Tensor:
    """Each label replaced by its class: ± root, FIXED."""
    found, back = torch.unique(labels, return_inverse=True)
    roots = [root * sign if root > FIXED else FIXED for root, sign in map(classes.find, found.tolist())]
    return torch.tensor(roots, device=labels.device)[back].view(labels.shape)


def _compressed(x: Tensor) -> Tensor:
    """The same with size 1 where it does not vary."""
    for d in range(x.ndim):
        if x.shape[d] > 1 and bool((x == x.narrow(d, 0, 1)).all()):
            x = x.narrow(d, 0, 1)
    return x.clone()


def _candidates(
    tracer: Tracer, places: Mapping[str, Places], labels: Mapping[str, Places], order: Sequence[str]
) -> list[Candidate]:
    roles = defaultdict(set)  # class -> {(parameter, whether it reads)}
    for name, pair in places.items():
        for x, reading in zip(pair, (False, True)):
            for root in torch.unique(x).tolist():
                if root != FIXED:
                    for part, sign in tracer.classes.parts(abs(root)).items():
                        roles[part].add((name, reading == (root * sign > 0)))
    spaces = _spaces(tracer.classes, roles)
    keys, turns, found = _keys(tracer.classes), tracer.turns, []
    turning = turns.turning(tracer.classes)
    for (where, _), roots in spaces.items():
        writers, readers = ([n for n in order if (n, reads) in where] for reads in (False, True))
        named = " -> ".join(", ".join(dict.fromkeys(map(_module, names))) for names in (writers, readers) if names)
        if not writers or not readers:
            found.append((Symmetry(named, "rescale", (len(roots),), ()), None, "nothing reads it"))
            continue
        turned = {root: i for i, root in enumerate(r for r in roots if r in turning)}
        slots = [
            turns.slot(tracer.classes, *role, _compressed(labels[role[0]][0]), turned)
            for role in sorted(where)
            if turned
        ]
        if turned and None not in slots:
            found.append((RotarySymmetry(named, "rotary", (len(turned), 2, 2), tuple(slots)), None, None))
            roots = [root for root in roots if root not in turned]
        for kind, groups in _mixing(roots, keys):
            slots = [slot for name, reads in sorted(where) for slot in _rows(name, reads, places[name], groups)]
            if None not in slots:
                shape = (len(groups), len(groups[0]), len(groups[0]))
                found.append((Symmetry(named, kind, shape, tuple(slots)), None, None))
                roots = [root for root in roots if not any(root in group for group in groups)]
        if roots:
            slots = [s for n, reads in sorted(where) for s in _entries(tracer.classes, n, reads, places[n], roots)]
            found.append((Symmetry(named, "rescale", (len(roots),), tuple(slots)), None, None))
    return found


def _spaces(classes: Classes, roles: Mapping[int, set]) -> dict[tuple, list[int]]:
    """{(roles, number): classes} of one role each; the factors of a product are in different spaces."""
    others, numbers, spaces = defaultdict(set), {}, defaultdict(list)
    for parts in map(classes.parts, classes.factors):
        for part in parts or ():
            others[part] |= set(parts)
    for root in sorted(roles):
        taken = {numbers[k] for k in others[root] if k in numbers}
        numbers[root] = next(n for n in itertools.count() if n not in taken)
        spaces[frozenset(roles[root]), numbers[root]].append(root)
    return spaces


def _module(name: str) -> str:
    """The module that a parameter belongs to; its own name if that is the model."""
    return name.rpartition(".")[0] or name


def _keys(classes: Classes) -> Keys:
    """{class: (what its members share with those of the classes that it mixes with, kind)} of those that may mix."""
    members = defaultdict(list)
    for label in range(FIXED + 1, len(classes.parent)):
        root, sign = classes.find(label)
        members[root].append((label, sign))
    keys = {}
    for root, labels in members.items():
        first = labels[0][1]
        keyed = [(classes.key[label], sign * first) for label, sign in labels if classes.key[label] is not None]
        key = frozenset(keyed)
        if keyed and len(key) == len(keyed) and all(classes.plain[label] for label, _ in labels):
            keys[root] = key, "linear" if classes.attended.isdisjoint(label for label, _ in labels) else "attention"
    return keys


def _mixing(roots: Sequence[int], keys: Keys) -> list[tuple[str, list[list[int]]]]:
    """(kind, groups of classes that mix among themselves, all of one size) for each kind and size."""
    groups, found = defaultdict(list), defaultdict(list)
    for root in roots:
        if root in keys:
            groups[keys[root]].append(root)
    for (_, kind), group in groups.items():
        if len(group) > 1:
            found[kind, len(group)].append(group)
    return [(kind, same) for (kind, _), same in found.items()]


def _standing(name: str, reads: bool, pair: Places) -> Iterator[Tensor]:
    """Where a parameter writes (or reads), +1 at a time: its two arrays of classes, negative where the other's."""
    for x, reading in zip(pair, (False, True)):
        yield x if reads == reading else -x


def _rows(name: str, reads: bool, pair: Places, groups: list[list[int]]) -> Iterator[Rows | None]:
    """The slots of classes that mix: rows or columns of the parameter. None among them if they stand otherwise."""
    for x in _standing(name, reads, pair):
        if not torch.isin(x, torch.tensor(sum(groups, []), device=x.device)).any():
            continue
        along = [d for d in range(x.ndim) if x.shape[d] > 1]
        row = x.flatten()
        table = [[(row == root).nonzero().flatten().tolist() for root in group] for group in groups]
        if len(along) != 1 or len({len(places) for group in table for places in group}) != 1:
            yield None
        else:
            yield Rows(name, reads, along[0], torch.tensor(table, device="cpu"))


def _entries(classes: Classes, name: str, reads: bool, pair: Places, roots: Sequence[int]) -> Iterator[Entries]:
    """The slots of classes that scale: for each number of the parameter, which of them it has."""
    numbers = dict(zip(roots, range(len(roots))))

    def number(label: int) -> int:
        parts = classes.parts(abs(label)) or {}
        return next((numbers[k] for k, sign in parts.items() if k in numbers and sign * label > 0), -1)

    for x in _standing(name, reads, pair):
        known, back = torch.unique(x, return_inverse=True)
        index = torch.tensor([number(label) for label in known.tolist()], device="cpu")[back.cpu()].view(x.shape)
        if (index >= 0).any():
            yield Entries(name, reads, index)
