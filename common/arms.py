"""Arms as members of one stack: who is trained, who is moved, how and when, and what each move did.

    ARMS = (Arm("baseline"), Arm("restart", restart=True), Arm("preactivation", move=ascend))
    stack = Stack(ARMS, W, "Adam", lr, moves=8)          # every arm, learning rate and run is a member
    stack.move(k, X, labels)                              # the k-th move of every arm that has one
    curves = stack.train(run, data, epochs, batch, at={2: before_step})

All arms start from the same weights and see the same mini-batches; a run's arms are teleported on the same batches. So
whatever differs between an arm and the baseline of the same run is the arm's doing, and is compared in pairs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.mlp import StackedMLP
from common.run import Run
from teleport import Activation, Teleportation, apply_to_layers, squared_gradient_norm

LARGEST = 1e4  # a member with a weight above has diverged, and is not moved any more


class Arm(NamedTuple):
    """One arm. Its name is true: `baseline`, its action's, `published`, `random`, `restart`, or its control's."""

    name: str
    move: Callable[..., Teleportation] | None = None  # move(weights, X, labels, …): None moves nothing
    restart: bool = False  # its optimizer is built anew after each move
    rate: float = 1.0  # of the learning rate that it was given
    raises: bool = False  # not moved: its learning rate grows as much as the move would have raised ‖∂L/∂W‖
    epoch: int | None = None  # of its moves, where arms differ
    moves: int | None = None  # how many it makes, where arms differ
    follows: str | None = None  # the arm before it whose Teleportation its move takes last: a control of the same size


class Stack:
    """A arms × learning rates × runs as one StackedMLP, and the record of what each move did.

    arms: in the order of every array's first axis. weights: (S, d_m, d_{m-1}), the runs' initial weights; with a number
    for rates also (A, S, d_m, d_{m-1}), each arm's own. rates: (F,) learning rates of every arm, or a number, which
    leaves the axis F out, or (A, F), every arm's own. moves: how many there will be at most.

    loss, objective: (A, [F,] S, moves, 2), on the move's batch, before and after; 0 for arms that do not move.
    seconds: (A,), of all moves so far. These three are on the CPU.
    """

    def __init__(self, arms: Sequence[Arm], weights: Sequence[Tensor], optimizer: str, rates: Any, moves: int) -> None:
        """Every arm at the initial weights of the runs."""
        first = weights[0]
        rates = torch.as_tensor(rates, dtype=first.dtype, device=first.device)
        rates = rates if rates.ndim > 1 else rates.expand(len(arms), *rates.shape)
        self.arms, self.shape = tuple(arms), (*rates.shape[1:], first.shape[-3])
        every = (len(self.arms), *self.shape)
        factors = first.new_tensor([arm.rate for arm in self.arms])
        rates = factors.view(-1, *(1 for _ in self.shape)) * rates[..., None]
        self._start = weights
        weights = [W.expand(*every, *W.shape[-2:]).flatten(0, len(self.shape)) for W in weights]
        self.net = StackedMLP(weights, optimizer, rates.expand(every).flatten())
        record = dict(dtype=torch.float64, device="cpu")
        self.loss, self.objective = (torch.zeros(*every, moves, 2, **record) for _ in range(2))
        self.seconds = torch.zeros(len(self.arms), **record)
        self._aside = 0.0  # seconds of evaluations, which are nobody's training

    def members(self, a: int) -> slice:
        """Where arm number a lies in the stack."""
        size = self.net.members // len(self.arms)
        return slice(a * size, (a + 1) * size)

    def by_arm(self, values: Tensor) -> Tensor:
        """Numbers of the members, (E, …), as (A, [F,] S, …)."""
        return values.unflatten(0, (len(self.arms), *self.shape))

    def move(self, k: int, *batch: Any, dtype: torch.dtype = torch.float32, epoch: int | None = None) -> None:
        """The k-th move of the arms that have one now, and restarts: arm.move(weights ([F,] S, d_m, d_{m-1}), *batch),
        with the other's Teleportation behind the batch for an arm that follows another."""
        made = {}
        for a, arm in enumerate(self.arms):
            if arm.epoch not in (None, epoch) or (arm.moves is not None and k >= arm.moves):
                continue
            mine, start = self.members(a), clock(self.net.lr.device)
            if arm.move is not None:
                lead = () if arm.follows is None else (made[arm.follows],)
                made[arm.name] = self._move(a, k, (*batch, *lead), dtype)
            if arm.restart:
                self.net.reset(mine)
            self.seconds[a] += clock(self.net.lr.device) - start

    def _move(self, a: int, k: int, batch: tuple, dtype: torch.dtype) -> Teleportation:
        arm, mine = self.arms[a], self.members(a)
        weights = tuple(W[mine].unflatten(0, self.shape).to(dtype) for W in self.net.weights)
        start = [(W[a] if W.ndim > 3 else W).to(dtype) for W in self._start]
        moved = spare(arm.move, start)(weights, *batch)
        if arm.raises:
            growth = (moved.objective_after / moved.objective_before).sqrt()
            self.net.lr[mine] *= growth.flatten().to(self.net.lr.dtype)
        else:
            self.net.set(mine, [W.flatten(0, -3).to(V.dtype) for W, V in zip(moved.weights, self.net.weights)])
        self.loss[a, ..., k, :] = torch.stack([moved.loss_before, moved.loss_after], -1)
        self.objective[a, ..., k, :] = torch.stack([moved.objective_before, moved.objective_after], -1)
        return moved

    def evaluate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of every member on x (n, d_0), y (n,): two tensors (A, [F,] S)."""
        start = clock(self.net.lr.device)
        results = tuple(self.by_arm(values) for values in self.net.evaluate(x, y))
        self._aside += clock(self.net.lr.device) - start
        return results

    def train(
        self, run: Run, data: Any, epochs: int, batch: int, at: Mapping[int, Callable], desc: str = "SGD"
    ) -> dict:
        """Train; at[epoch](i) comes before mini-batch i of that epoch, and may move.

        data: x (n, d_0), y (n,), x_test, y_test. Returns the curves train_loss (mean batch loss of an epoch), test_loss
        and test_accuracy, (A, [F,] S, epochs), and seconds (A, epochs) of one member: its share of the stack's time
        and of its arm's moves, without the evaluation.
        """
        curves = {key: [] for key in ("train_loss", "test_loss", "test_accuracy", "seconds")}
        training, device, own = 0.0, self.net.lr.device, self.net.members // len(self.arms)
        for epoch in run.progress(range(epochs), desc=desc, unit="epoch"):
            start, aside = clock(device), self.seconds.sum().item() + self._aside
            curves["train_loss"].append(self.by_arm(self.net.train_epoch(data.x, data.y, batch, at.get(epoch))))
            training += clock(device) - start - (self.seconds.sum().item() + self._aside - aside)
            for key, values in zip(("test_loss", "test_accuracy"), self.evaluate(data.x_test, data.y_test)):
                curves[key].append(values)
            curves["seconds"].append(training / self.net.members + self.seconds / own)
        return {key: torch.stack(values, -1) for key, values in curves.items()}


def spare(move: Callable, start: Sequence[Tensor]) -> Callable:
    """The move, of the members that have not diverged: the others stay where they are, and their numbers are NaN.

    start: initial weights, of the members' shapes but for leading axes; they stand in for those that are spared.
    """

    def spared(weights: tuple, *batch: Any) -> Teleportation:
        sound = torch.stack([W.abs().amax((-2, -1)) < LARGEST for W in weights]).all(0)  # False for NaN
        if sound.all():
            return move(weights, *batch)
        here = sound[..., None, None]
        moved = move(tuple(torch.where(here, W, V) for W, V in zip(weights, start)), *batch)
        numbers = (torch.where(sound, values, torch.nan) for values in moved[1:])
        return type(moved)(tuple(torch.where(here, V, W) for V, W in zip(moved.weights, weights)), *numbers)

    return spared


def as_large(ascend: Callable, loss: Callable, action: Callable, activation: Activation, seed: int) -> Callable:
    """A move by a random element about as large as the ascent's: I + cT per hidden layer, T normal, c such that all
    weights together change as much as by ascend(weights, X, labels). Six corrections of c: enough for small moves; far
    from linear they miss, by up to a factor of 8 in the regression of NeurIPS 2022.

    loss(X, labels) -> loss_fn, as `teleport.teleport` takes it.
    """
    generator = torch.Generator().manual_seed(seed)

    def move(weights: tuple, X: Tensor, labels: Tensor) -> Teleportation:
        goal, loss_fn = ascend(weights, X, labels), loss(X, labels)
        size, c = distance(goal.weights, weights), 1e-3
        T = [torch.randn(*W.shape[:-1], W.shape[-2], generator=generator).to(W) for W in weights[:-1]]
        for _ in range(6):
            elements = [torch.eye(t.shape[-1]).to(t) + c * t for t in T]
            moved = apply_to_layers(weights, X, elements, action, activation)
            c = c * (size / distance(moved, weights).clamp_min(1e-30))[..., None, None].clamp(0.1, 100)
        after = loss_fn(moved), squared_gradient_norm(moved, loss_fn)
        return Teleportation(moved, goal.loss_before, after[0], goal.objective_before, after[1])

    return move


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Frobenius distance of all weights together, of each member: (*E,)."""
    return sum((A - B).square().sum((-2, -1)) for A, B in zip(first, second)).sqrt()


def draw_batches(x: Tensor, y: Tensor, size: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Each run's own random batch of rows of x (n, d_0), y (n,): X (S, d_0, size) and labels (S, size)."""
    rows = torch.stack([torch.randperm(len(x), generator=g, device=g.device)[:size] for g in generators]).to(x.device)
    return x[rows].mT, y[rows]


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
