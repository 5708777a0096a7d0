"""The Teleporter: finds a model's symmetries, checks that it may move, and moves."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport import Teleportation, _check_positive, postactivation_action, preactivation_action
from teleporter import listing, named, rotations
from teleporter.finder import Finder, exact_candidates
from teleporter.hidden import act_on_hidden, pull_back
from teleporter.low_rank import LowRankRotation
from teleporter.moves import Moves
from teleporter.passes import check_loss, gradient, kept_buffers, recorded_inputs, same_randomness, undone_on_error
from teleporter.permutations import Permutations
from teleporter.state import checked, copies, notes, resolve_unknown, transport
from teleporter.symmetry import Attention, Pair, move_
from teleporter.verify import (
    called,
    difference,
    fingerprint,
    nothing_found,
    outputs_of,
    precision,
    proper,
    refuse_distributed,
    refuted,
    relative_change,
    tensors_of,
)

_ACTIONS = {"preactivation": preactivation_action, "postactivation": postactivation_action}
_BY_HAND, _HALVINGS = Pair | Attention | rotations.Rotary | rotations.Stream, 10


class Teleporter(Moves):
    """Moves a model's parameters, in place, along its symmetries to where an objective is larger.

    model: any nn.Module. symmetries: "auto" (all that are exact), or a list of "rescale", "attention", "stream"
    (found in the model), Pair, Attention, Rotary and Stream (given by hand); or ["preactivation"] or
    ["postactivation"]; or "low_rank" with objective "gradient_eigenbasis" and an optimizer, which rotates the inner
    spaces of a LoRA (low_rank.py): `step()` then takes nothing and goes between optimizer.step() and zero_grad(),
    `low_rank` is the LowRankRotation; or "permutation", orders of hidden units: only `permute` and `undo`. objective:
    "gradient_norm", ‖∂L/∂W‖² over all trainable parameters; "line_search_decrease", what the best first step of the
    optimizer gains by Gauss-Newton; "look_ahead", minus the loss after some of its steps; "balance", −Σ‖W‖², which goes
    to its maximum at once, whatever the bound; or objective(loss, parameters) -> scalar, parameters {name: tensor},
    which must be differentiable in them (through torch.autograd.grad(..., create_graph=True) if it uses
    gradients). maximize: False makes it smaller. bound: one step scales every channel, and every singular value of an
    attention element, by a factor within [1/bound, bound]; of a data-dependent action, log(bound) is the Frobenius norm
    of its tangent. With 2, the default, rescalings are by powers of two, which floating point does without any
    rounding. optimizer: one or a list; what it remembers moves to what it would be had the past gradients been taken at
    the moved weights (state.py; a tensor of unknown kind is an error unless on_unknown_state is "keep" or "reset", to
    zero). What cannot move exactly, as coupled weight decay, is printed with the symmetries, or with strict=True an
    error. averaged: a copy of the model that averages its weights (torch.optim.swa_utils.AveragedModel, an EMA, a
    dict), or a list of them; it moves too. tolerance: the drift allowed, relative to 1 + |loss|, and the change of the
    output, relative to its size. inputs: what `step` takes; with them one run is followed operation by operation
    (tracing.py), which finds the most, and the symmetries are tried at once, otherwise before the first step: each is
    moved by a random element, on the model with disturbed weights in float64 (in its own dtype where that fails), which
    is then put back; one that changes the output is left alone. That costs three forward passes, once. total_bound: the
    largest factor since the start, of all moves together.

    Attributes: symmetries, a list of Symmetry (or HiddenAction); left_alone, {writers: why their output stays}.

    Raises ValueError if nothing can be moved, for an option or module that does not exist, and for half precision.
    Frozen parameters are left alone, without inputs shared ones too. Parameters may be on several devices. Without
    inputs, a forward pass that torch.fx cannot trace is searched module by module. Hooks, and branches other than the
    traced one (training mode, optional arguments all given), are out of the finder's sight: that is what the trial is
    for, and `step` measures the loss and the outputs, undoes a move that changed them and says so. RuntimeError for a
    model that changed since.
    """

    def __init__(self, model, symmetries="auto", objective="gradient_norm", bound=2.0, *, maximize=True, optimizer=None,
                 averaged=None, strict=False, on_unknown_state=None, tolerance=1e-3, inputs=None,
                 total_bound=2.0**20):  # fmt: skip
        self.low_rank = self.permutations = None
        items = [symmetries] if isinstance(symmetries, str) else list(symmetries)
        if objective == "gradient_eigenbasis" or "low_rank" in items:
            if objective != "gradient_eigenbasis" or items != ["low_rank"]:
                raise ValueError('symmetries "low_rank" and objective "gradient_eigenbasis" only go with each other')
            if (bound, maximize, strict, on_unknown_state) != (2.0, True, False, None):
                raise ValueError("bound, maximize, strict and on_unknown_state have no meaning for low_rank")
            self.low_rank = LowRankRotation(model, optimizer, averaged=averaged, inputs=inputs)
            self.symmetries, self.left_alone = [], self.low_rank.left_alone
            return
        refuse_distributed(model)
        _check_positive("tolerance", tolerance)
        if on_unknown_state not in (None, "keep", "reset"):
            raise ValueError(f'on_unknown_state must be None, "keep" or "reset", got {on_unknown_state!r}')
        if "permutation" in items:
            if items != ["permutation"] or (objective, bound, maximize, strict) != ("gradient_norm", 2.0, True, False):
                raise ValueError(
                    '"permutation" stands alone: objective, bound, maximize, strict have no meaning for it'
                )
            self.permutations = Permutations(model, inputs, optimizer, averaged, on_unknown_state, tolerance)
            self.symmetries, self.left_alone = self.permutations.symmetries, self.permutations.left_alone
            return
        self.named = named.checked(objective, optimizer, items, maximize, bound)
        if not bound <= total_bound < math.inf:
            raise ValueError(f"total_bound must be finite and not below bound, got {total_bound}")
        for item in items:
            if not isinstance(item, _BY_HAND) and item not in ("auto", "rescale", "attention", "stream", *_ACTIONS):
                raise ValueError(f"symmetries: {item!r} is neither a kind nor a Pair, Attention, Rotary or Stream")
        self.action = next((_ACTIONS[item] for item in items if isinstance(item, str) and item in _ACTIONS), None)
        if self.action is not None and len(items) > 1:
            raise ValueError("symmetries: a data-dependent action must stand alone")
        self.model, self.bound, self.sign, self.tolerance = model, bound, 1 if maximize else -1, tolerance
        self.objective, self.optimizer = objective if callable(objective) else None, optimizer
        self.averaged, self.strict, self.on_unknown_state = averaged, strict, on_unknown_state
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.items, self.symmetries, self.left_alone = items, [], {}
        self.total_bound, self.moves, self.totals = total_bound, [], {}
        self.verified = self.action is not None
        self.fingerprint = fingerprint(model)
        self._find(inputs)
        self._followers()
        if inputs is not None:
            self._verify(inputs)

    def _find(self, inputs):
        """Search; without inputs, what they would have to decide is left alone."""
        finder = Finder(self.model, on_trial=inputs is not None or self.action is not None)
        items = self.items
        kinds = {item for item in items if isinstance(item, str)}
        if self.action is not None or len(kinds) < len(items):  # by hand
            finder.search()
        found = finder.hidden if self.action is not None else []
        found = found + exact_candidates(self.model, finder, kinds, inputs)
        self.symmetries, self.left_alone = [], {}
        by_hand = [finder.pair(item) for item in items if isinstance(item, Pair)]
        by_hand += [h for item in items if isinstance(item, Attention) for h in finder.attention(item)]
        by_hand += rotations.by_hand(finder, items)
        for candidates, wanted in ((found, False), (by_hand, True)):
            for symmetry, modules, reason in candidates:
                reason = reason or (finder.obstacle(symmetry.slots, modules) if modules is not None else None)
                if reason is None:
                    self.symmetries.append(symmetry)
                elif wanted:
                    raise ValueError(f"{symmetry.name}: {reason}")
                else:
                    self.left_alone[symmetry.name] = reason
        if not self.symmetries and (inputs is not None or "no inputs were given" not in str(self.left_alone)):
            raise nothing_found(self.left_alone, inputs)

    def __repr__(self):
        if self.low_rank is not None:
            return repr(self.low_rank).replace("LowRankRotation", "Teleporter")
        found = listing.lines(self.table())
        found += [("not exact", note) for note in (() if self.permutations is not None else self._notes())]
        return "Teleporter(\n" + "".join(f"  {kind:<11} {what}\n" for kind, what in found) + ")"

    def table(self) -> list[dict]:
        """What `print` shows, in full: {"kind", "name", "shape", "dimension", "reason"} of each symmetry (reason None)
        and of each output that is left alone (kind "left alone", dimension 0)."""
        return listing.rows(self.symmetries, self.left_alone)

    def _moving(self):
        return {slot.name: self.parameters[slot.name] for s in self.symmetries for slot in s.slots}

    def _notes(self):
        halves = sorted({p.dtype for p in self._moving().values() if p.dtype.itemsize < 4}, key=str)
        rounded = [f"weights in {d} round at every move, by up to {torch.finfo(d).eps / 2:.2g} of each" for d in halves]
        return rounded + notes(self._moving(), checked(self.optimizer, {}), self.symmetries)

    def _followers(self):
        """What moves with the parameters: optimizers and averaged copies. ValueError if one of them cannot."""
        optimizers = checked(self.optimizer, self._moving())
        resolve_unknown(self._moving(), optimizers, self.on_unknown_state and "keep")
        if self.strict and self._notes():
            raise ValueError(f"strict: not exact: {'; '.join(self._notes())}")
        return optimizers, copies(self.averaged, self._moving())

    def _transport(self, symmetries, tangents):
        transport(self.parameters, *self._followers(), symmetries, tangents, self.on_unknown_state)
        torch.clear_autocast_cache()  # of what the caller casts next

    def _verify(self, inputs, search=False):
        """Check that nothing changed since the model was searched and, once, try every symmetry on these inputs.

        search: whether to look for more, now that there are inputs.
        """
        change = difference(self.fingerprint, fingerprint(self.model))
        if change is not None:
            raise RuntimeError(f"{change}: make a new Teleporter")
        self._followers()
        if self.verified or inputs is None:
            return
        if search and not self.moves:
            self._find(inputs)
        wrong = refuted(self.model, self.parameters, self.symmetries, inputs)
        self.left_alone |= wrong
        kept = [s for s in self.symmetries if s.name not in wrong]
        if not kept:
            raise RuntimeError(f"every symmetry found changed the output when tried, which was undone\n{self}")
        self.symmetries, self.verified = kept, True

    def step(self, inputs=None, loss_fn: Callable | None = None, ahead: list | None = None) -> Teleportation | None:
        """One teleport: ascend the objective of loss_fn(model(inputs)) over the symmetries, from the identity.

        inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments) for model(...). loss_fn(output)
        -> scalar; it must depend on the parameters through the output alone. The step goes as far as `bound` allows in
        the steepest direction. The gradient norm grows all the way; another objective is tried there and then at half
        the distance, up to ten times, and the parameters stay if nothing helps. Random numbers (dropout) are the same
        before and after; neither they nor buffers (running statistics) notice that a teleport happened. ahead: what
        look_ahead steps on, [(inputs, loss_fn), …], the last held out; else this batch. balance needs no arguments.

        Cost: two forward-backward passes for the gradient norm; else the objective's derivative, and itself once for
        each trial. Returns the Teleportation, its weights {name: parameter that may have moved}. Raises ValueError
        for a loss that is not a finite scalar, RuntimeError (parameters restored) if an exact symmetry moved the loss.
        """
        if self.low_rank is not None:
            if inputs is not None or loss_fn is not None:
                raise ValueError("step() of low_rank takes no arguments: it reads the gradients that backward left")
            return self.low_rank.step()
        self._refuse_permutations()
        if loss_fn is None and self.named != "balance":
            raise ValueError("step needs inputs and loss_fn")
        self._verify(inputs, search=True)
        moving = self._moving()
        if loss_fn is None:
            return named.balanced(self, moving, inputs)
        if self.named == "look_ahead":
            self.objective = named.ahead(self.model, self.optimizer, ahead or [(inputs, loss_fn)] * 6)
        outputs = []

        def watched(output):
            outputs.append(tensors_of(output))
            return loss_fn(output)

        with torch.enable_grad(), kept_buffers(self.model), undone_on_error(moving) as undo:
            loss, value, tangents, hidden = self._evaluate(inputs, watched, derivative=True)
            tangents = self._within_total_bound(tangents, self._allowed([]))
            for _ in range(1 + _HALVINGS):
                if self._move(tangents, hidden):
                    loss_after, value_after = self._evaluate(inputs, watched)
                    allowed = self._allowed(outputs[0])
                    kept = abs(loss_after - loss) <= allowed * (1 + abs(loss))
                    change = 0.0 if self.action is not None else relative_change(outputs[0], outputs[-1])
                    kept = kept and change <= allowed
                    if kept and self.sign * (value_after - value) >= 0:
                        break
                    if self.action is None and not kept:
                        raise RuntimeError(
                            f"teleporting moved the loss from {loss:.6g} to {loss_after:.6g}, the output by "
                            f"{change:.2g} of its size, and was undone: it "
                            f"depends on some of these parameters in a way that the model's graph does not show\n{self}"
                        )
                undo()
                tangents = [T / 2 for T in tangents]
            else:
                tangents, loss_after, value_after = [T * 0 for T in tangents], loss, value
        if self.action is None:
            self._remember(tangents)
        return Teleportation(moving, loss, loss_after, value, value_after)

    def random_tangents(self, generator=None) -> list:
        """Tangents as long as those of `step` in a random direction: `apply` them for a control."""
        self._refuse_rotations()
        self._refuse_permutations()
        like = dict(generator=generator, dtype=torch.float64, device="cpu" if generator is None else generator.device)
        random = (torch.randn(s.shape, **like).cpu() for s in self.symmetries)
        return [s.steepest(D) * math.log(self.bound) for s, D in zip(self.symmetries, random)]

    def apply(self, tangents: list, inputs=None) -> None:
        """Move by exp(T), one T (Symmetry.shape, used in float64) for each exact symmetry; -T moves back exactly.

        inputs: as of `step`. If given, the symmetries are tried first and the outputs compared. Raises ValueError for
        tangents of other shapes, not finite, none of their symmetry (its `tangent(T)` is one) or beyond total_bound
        since the start; RuntimeError (parameters restored) for a model that was changed after the Teleporter was made,
        and for outputs that moved.
        """
        self._refuse_rotations()
        self._refuse_permutations()
        if self.action is not None:
            raise ValueError("a data-dependent action has no meaning without data: use step")
        tangents = proper(tangents, self.symmetries)
        count = len(self.symmetries)
        self._verify(inputs)
        if len(self.symmetries) != count:
            raise RuntimeError(f"some symmetries changed the output when tried, nothing was moved\n{self}")
        if any((a != b).any() for a, b in zip(tangents, self._within_total_bound(tangents))):
            raise ValueError(f"tangents would scale by more than total_bound = {self.total_bound:g} since the start")
        moving = self._moving()
        with undone_on_error(moving):
            before = outputs_of(self.model, inputs)
            self._move(tangents)
            change = relative_change(before, outputs_of(self.model, inputs))
            if change > self._allowed(before):
                raise RuntimeError(f"moving changed the output by {change:.2g} of its size and was undone")
        self._remember(tangents)

    def _allowed(self, outputs):
        """The relative change of the output that counts as none: tolerance, or the rounding of half precision."""
        return max(self.tolerance, 16 * precision([*self.parameters.values(), *outputs]))

    def __getstate__(self):
        return vars(self) | {"fingerprint": None} | ({"objective": None} if vars(self).get("named") else {})

    def __setstate__(self, state):
        vars(self).update(state)
        if self.low_rank is None and self.permutations is None:
            self.fingerprint = fingerprint(self.model)

    @torch.no_grad()
    def _move(self, tangents, hidden=None):
        """Move the parameters; False if a data-dependent action cannot take that step."""
        if self.action is None:
            move_(self.parameters, self.symmetries, tangents)
            return True
        try:
            moved = act_on_hidden(self.action, self.symmetries, self.parameters, tangents, hidden)
        except ValueError:  # a post-activation step left the range of its activation
            return False
        for name, W in moved.items():
            self.parameters[name].copy_(W)
        return True

    def _evaluate(self, inputs, loss_fn, derivative=False):
        """loss, objective; with derivative also the tangents of the steepest ascent and the inputs of hidden layers."""
        aim = named.AIMS.get(self.named)
        by_transport = self.objective is None and self.action is None
        second = aim is not None or derivative and not by_transport
        read_by = [s.V for s in self.symmetries] if derivative and self.action is not None else []
        with same_randomness(self.model), recorded_inputs(self.model, read_by) as hidden:
            with sdpa_kernel(SDPBackend.MATH) if second else nullcontext():  # the others have no second derivative
                output = called(self.model, inputs) if aim is None else named.apart(called(self.model, inputs))
                loss = loss_fn(output)
        check_loss(loss)
        W = self.parameters
        if aim is not None:
            value, tangents = aim(self.optimizer, loss, output, W, derivative and self.symmetries, math.log(self.bound))
            return (loss.detach(), value.detach(), tangents, hidden)[: 4 if derivative else 2]
        if self.objective is None:
            G = gradient(loss, W, create_graph=second)
            value = sum(g.square().sum().to(loss.device) for g in G.values())
        else:
            value = self.objective(loss, W)
        if not derivative:
            return loss.detach(), value.detach()
        if by_transport:  # ‖M^-T G‖²: gradients move against the weights
            tangents = [s.norm_derivative({n: -2 * g for n, g in G.items()}, G) for s in self.symmetries]
        else:
            C = gradient(value, W)
            if self.action is not None:
                tangents = pull_back(self.action, self.symmetries, W, C, hidden)
            else:
                tangents = [s.derivative(C, W) for s in self.symmetries]
        tangents = [self.sign * math.log(self.bound) * s.steepest(D) for s, D in zip(self.symmetries, tangents)]
        return loss.detach(), value.detach(), tangents, hidden
