"""Ensembles along a symmetry: many networks from one trained convnet, by the data-dependent group action.

Source: Zhao, Ganev, Walters, Yu, Dehmamy, *Symmetries, Flat Minima, and the Conserved Quantities of Gradient Flow*
(ICLR 2023, arXiv 2210.17216), the ensembles of Figures 10 and 11.

The network is conv 3×3 (c → 32), leaky ReLU, 2×2 max pooling, linear V to h = 16 units, σ, linear U to 10 logits. Let H
(h, n) be the input of σ, columns are samples. A group element g acts by H → gH, U → Uπ(g, H), π(g, H) = σ(H) σ(gH)^+.

Where the transformed network agrees with the original:
- on the batch that defined π, exactly (up to rounding), if σ(gH) has full column rank, so for at most h samples;
- on new samples only approximately: σ(H) = π σ(gH) does not hold there, and `relative_change` measures by how much.

All members of an ensemble share everything up to H, so H is computed once and only g and Uπ are stacked: the last two
layers of a hundred networks cost less than the convolution. They are evaluated in float64: exp(εT) is ill-conditioned,
and at ε = 10 nothing is left of single precision (at 20, hardly anything of double).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from nonlinear_action import data_dependent_action
from torch import Tensor

from teleport import Activation, leaky_relu

HIDDEN = 16
CHANNELS = 32
CHUNK = 100  # samples at once: what they need stays in the cache, which is four times as fast as a thousand


def _square(z):
    return F.leaky_relu(z, 0.1) ** 2 + 0.01 * z


def _square_derivative(z):
    return torch.where(z > 0, 2.0, 0.02) * z + 0.01


LEAKY_RELU = leaky_relu(0.1)  # Figure 11
SQUARED_LEAKY_RELU = Activation("squared_leaky_relu", _square, _square_derivative, None, False)  # Figure 10
ACTIVATIONS = {a.name: a for a in (LEAKY_RELU, SQUARED_LEAKY_RELU)}

# ---------------------------------------------------------------------------------------------------------------------
# The network


class ConvNet(NamedTuple):
    K: Tensor  # (32, c, 3, 3) convolution, and its bias
    a: Tensor  # (32,)
    V: Tensor  # (h, 32 · pooled pixels)
    b: Tensor  # (h, 1)
    U: Tensor  # (10, h)
    c: Tensor  # (10, 1)


def initialize(shape, generator: torch.Generator, hidden: int = HIDDEN) -> ConvNet:
    """Weights and biases uniform in ±1/√fan-in. shape: (channels, height, width) of an image, even height and width."""
    c, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(f"shape {shape}: height and width must be even to be pooled 2×2")

    def uniform(fan_in, *size):
        return (2 * torch.rand(size, generator=generator) - 1) / fan_in**0.5

    pooled = CHANNELS * height * width // 4
    return ConvNet(
        uniform(9 * c, CHANNELS, c, 3, 3),
        uniform(9 * c, CHANNELS),
        uniform(pooled, hidden, pooled),
        uniform(pooled, hidden, 1),
        uniform(hidden, 10, hidden),
        uniform(hidden, 10, 1),
    )


def hidden_input(net: ConvNet, x: Tensor, shape) -> Tensor:
    """H (h, n), the input of σ, for images x (n, c · height · width) in [0, 1]; the network sees them minus 1/2."""
    columns = []
    for images in (x - 0.5).split(CHUNK):
        # Channels last: several times as fast, if the strides say so even for one channel, hence clone.
        images = images.view(-1, *shape).clone(memory_format=torch.channels_last)
        maps = F.max_pool2d(F.conv2d(images, net.K, net.a, padding=1), 2)  # before leaky ReLU: same maxima, less work
        columns.append(net.V @ F.leaky_relu(maps, 0.01).flatten(1).T + net.b)
    return torch.cat(columns, 1)


def split(data, images: int | None = None):
    """((x, y) to train on, (x, y) held out): the first four fifths and the last fifth of the first `images` images."""
    x, y = data.x[:images], data.y[:images]
    n = 4 * len(x) // 5
    return (x[:n], y[:n]), (x[n:], y[n:])


def train(
    x: Tensor, y: Tensor, shape, activation: Activation, *, epochs: int, seed: int, progress=iter, twice: bool = False
) -> ConvNet:
    """Train from scratch by Adam (lr 1e-3) on cross-entropy, batches of 32 in the dataset's order.

    x (n, features) in [0, 1], y (n,) labels. progress wraps the range of epochs (a progress bar). twice: as published,
    through a softmax before the cross-entropy, which takes another. Returns the ConvNet, detached, on x's device.
    """
    generator = torch.Generator().manual_seed(seed)
    net = ConvNet(*(p.to(x.device).requires_grad_() for p in initialize(shape, generator)))
    optimizer = torch.optim.Adam(net, lr=1e-3, fused=True)
    for _ in progress(range(epochs)):
        for images, labels in zip(x.split(32), y.split(32)):
            logits = net.U @ activation.f(hidden_input(net, images, shape)) + net.c
            optimizer.zero_grad()
            F.cross_entropy((logits.softmax(0) if twice else logits).T, labels).backward()
            optimizer.step()
    return ConvNet(*(p.detach() for p in net))


# ---------------------------------------------------------------------------------------------------------------------
# Ensembles: n elements g_k (n, h, h) with the matrices π_k (n, h, h) that are to undo them

ARMS = ("group", "interpolated_permutation", "inverse", "random", "shuffled")
NAMES = {  # in figures
    "original": "original",
    "group": "group",
    "interpolated_permutation": "interpolated permutation",
    "inverse": "$g^{-1}$",
    "random": "random",
    "shuffled": "shuffled π",
}


class EnsembleDraws(NamedTuple):
    """The random numbers of one ensemble, shared by all ε and all arms, so that their differences are paired."""

    T: Tensor  # (n, h, h) standard normal / √h: elements of the Lie algebra, g = exp(εT)
    R: Tensor  # (n, h, h) uniform in [0, 1]
    P: Tensor  # (n, h, h) permutation matrices
    elements: Tensor  # (n,) a permutation of the elements
    units: Tensor  # (h,) a permutation of the hidden units


def draw(elements: int, seed: int, device="cpu", hidden: int = HIDDEN) -> EnsembleDraws:
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(elements, hidden, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    R = torch.rand(elements, hidden, hidden, generator=generator, dtype=torch.float64)
    P = torch.eye(hidden, dtype=torch.float64)[torch.rand(elements, hidden, generator=generator).argsort(1)]
    orders = (torch.randperm(n, generator=generator) for n in (elements, hidden))
    drawn = EnsembleDraws(T, R, P, *orders)
    return EnsembleDraws(*(d.to(device) for d in drawn))


def ensemble(arm: str, draws: EnsembleDraws, epsilon: float, H: Tensor, activation: Activation):
    """The ensemble (g, π), both (n, h, h) in float64, of one of ARMS. H (n, h, m): for each element the batch for π.

    group: g = exp(εT), π = σ(H) σ(gH)^+. The controls keep that g and replace π:
    inverse by g^-1, random by I + εR, shuffled by another element's π with its columns permuted;
    interpolated_permutation: g = (I + ε (I + P)/2) / (1 + ε), between I and the middle of I and P, π = g^-1.
    Raises ValueError for an unknown arm, and as `data_dependent_action`.
    """
    eye = torch.eye(H.shape[-2], dtype=H.dtype, device=H.device)
    if arm == "interpolated_permutation":
        g = (eye + epsilon / 2 * (eye + draws.P)) / (1 + epsilon)
        return g, torch.linalg.inv(g)
    g = torch.linalg.matrix_exp(epsilon * draws.T)
    if arm == "group":
        return g, data_dependent_action(g, H, activation)
    if arm == "inverse":
        return g, torch.linalg.matrix_exp(-epsilon * draws.T)
    if arm == "random":
        return g, eye + epsilon * draws.R
    if arm == "shuffled":
        return g, data_dependent_action(g, H, activation)[draws.elements][..., draws.units]
    raise ValueError(f"arm {arm!r}: choose one of {', '.join(ARMS)}")


def original(net: ConvNet):
    """The network itself as an ensemble of one: g = π = I, (1, h, h)."""
    eye = torch.eye(net.U.shape[1], dtype=torch.float64, device=net.U.device)[None]
    return eye, eye


def batches(H: Tensor, elements: int, size: int) -> Tensor:
    """Deal the columns of H (h, m) out, `size` to each element, cyclically if they are too few: (elements, h, size)."""
    columns = torch.arange(elements * size, device=H.device) % H.shape[1]
    return H[:, columns].unflatten(1, (elements, size)).transpose(0, 1)


def logits(net: ConvNet, members, H: Tensor, activation: Activation) -> Tensor:
    """Uπ σ(gH) + c of every member at once, (n, 10, m). members: (g, π); H (h, m), or (n, h, m) for one batch each."""
    g, pi = members
    return (net.U.double() @ pi) @ activation.f(g @ H) + net.c.double()


def relative_change(moved: Tensor, at_rest: Tensor) -> Tensor:
    """‖moved − at_rest‖ / ‖at_rest‖, Frobenius norms, per member: how far the action moved the logits."""
    return (moved - at_rest).norm(dim=(-2, -1)) / at_rest.norm(dim=(-2, -1))


def vote(outputs: Tensor, counts) -> Tensor:
    """The class that most of the first `count` members choose, for each count: (len(counts), m) from (n, 10, m)."""
    choice = outputs.max(1).indices  # argmax is several times slower over a middle dimension
    return F.one_hot(choice, outputs.shape[1]).cumsum(0)[torch.as_tensor(counts) - 1].argmax(-1)


def predict(net: ConvNet, members, H: Tensor, activation: Activation) -> Tensor:
    """The class that most members choose for each column of H (h, m): (m,)."""
    outputs = (logits(net, members, columns, activation) for columns in H.split(CHUNK, 1))
    return torch.cat([vote(o, [len(o)])[0] for o in outputs])


def mean_std(values) -> dict:
    """Mean and standard deviation of one number a network; 0 for one network."""
    return {"mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else 0.0}


def losses(outputs: Tensor, y: Tensor, counts) -> Tensor:
    """−log of the mean probability that the first `count` members give to the right class, (len(counts), m)."""
    counts = torch.as_tensor(counts, device=y.device)
    right = outputs.log_softmax(1)[:, y, torch.arange(len(y), device=y.device)]
    return counts.double().log()[:, None] - right.logcumsumexp(0)[counts - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Attacks: gradient(x) is the derivative of the attacked loss with respect to the images x in [0, 1]


def fgsm(gradient, x: Tensor, radii, *, low=0.0, high=1.0) -> list:
    """Fast gradient sign method: for each radius, one step of that length in every pixel, kept within [low, high]."""
    direction = gradient(x).sign()
    return [(x + radius * direction).clamp(low, high) for radius in radii]


def pgd(gradient, x: Tensor, iterations: int, *, radius: float, step: float, noise=None, low=0.0, high=1.0) -> list:
    """Projected gradient descent: the images after 0, 1, …, `iterations` steps.

    Each step moves every pixel by `step`, then back to within `radius` of x and into [low, high]. It starts at x, or at
    x + radius · noise (noise like x, in [−1, 1]).
    """
    z = x if noise is None else (x + radius * noise).clamp(low, high)
    path = [z]
    for _ in range(iterations):
        z = z + step * gradient(z).sign()
        z = (x + (z - x).clamp(-radius, radius)).clamp(low, high)
        path.append(z)
    return path


def input_gradient(
    net: ConvNet, members, x: Tensor, y: Tensor, shape, activation: Activation, twice: bool = False
) -> Tensor:
    """∂/∂x of the loss of the whole ensemble, −log of the mean probability of the right class, summed over samples.

    twice: through a softmax before that of the loss, as published.
    """
    gradients = []
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK)):
        images = images.detach().requires_grad_()
        outputs = logits(net, members, hidden_input(net, images, shape).double(), activation)
        outputs = outputs.softmax(1) if twice else outputs
        gradients.append(torch.autograd.grad(losses(outputs, labels, [len(outputs)]).sum(), images)[0])
    return torch.cat(gradients)
