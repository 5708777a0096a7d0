"""The losses that scripts share. Columns are samples; *E is any ensemble shape, and each member gets its own number."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.functional import log_softmax

from teleport import Activation


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over samples, in nats: logits (*E, C, n), labels (n,) or (*E, n) of class indices -> (*E,).

    Raises ValueError where samples and labels differ in number, torch's RuntimeError for other shapes that do not fit
    and for a class that is not among the C.
    """
    if labels.shape[-1:] != logits.shape[-1:]:  # torch gathers as many as there are labels
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: one for each column")
    log_p = log_softmax(logits, -2)
    index = labels.unsqueeze(-2).expand(*log_p.shape[:-2], 1, -1)
    return -log_p.gather(-2, index).mean((-2, -1))


def batch_loss(X: Tensor, labels: Tensor, activation: Activation) -> Callable[[Sequence[Tensor]], Tensor]:
    """loss_fn(weights) -> (*E,), as `teleport.teleport` takes it: the mean cross-entropy on a batch.

    X (d_0, n) or (*E, d_0, n), labels (n,) or (*E, n), weights W_m (*E, d_m, d_{m-1}). The loss of `teleport.forward`
    without its checks, so that a member that has diverged (its loss is NaN) does not stop the others.
    """
    return lambda weights: cross_entropy(_output(weights, X, activation), labels)


def half_squared_error(X: Tensor, Y: Tensor, activation: Activation) -> Callable[[Sequence[Tensor]], Tensor]:
    """loss_fn(weights) -> (*E,): ½‖Y − W_L σ(… σ(W_1 X))‖², X (*E, d_0, n), Y (*E, d_L, n); the regressions' loss."""
    return lambda weights: 0.5 * (Y - _output(weights, X, activation)).square().sum((-2, -1))


def _output(weights: Sequence[Tensor], h: Tensor, activation: Activation) -> Tensor:
    for W in weights[:-1]:
        h = activation.f(W @ h)
    return weights[-1] @ h
