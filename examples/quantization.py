"""Equalize a trained network's channel ranges before its weights are rounded to int8: one function, better rounded.

A tensor rounded to int8 has one step for all its channels, so that a channel of small weights keeps few of the 255
levels. Rescaling a hidden channel (incoming weights × s, outgoing / s) leaves the function alone and makes the ranges
alike: cross-layer equalization (Nagel and others, ICCV 2019). Here it is a teleport along the same symmetry, for any
module, with an `objective=` that is a function of the weights alone:

    teleporter = Teleporter(model, objective=ranges, maximize=False, inputs=x)

Networks: a MobileNet-like one (depthwise convolutions, BatchNorm folded into them, as it is before quantization) and
a ResNet-like one. Training leaves channel ranges that differ; a network whose channels were scaled apart, by random
factors within [1/e², e²], shows the same function with ranges as bad as they come.
Under a minute: `python examples/quantization.py [--samples N] [--epochs N] [--steps N]`.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data  # noqa: E402
from teleporter import Teleporter  # noqa: E402

LEVELS = 127


def layer(inside, outside, size=3, activation=True, **options):
    """A convolution and its BatchNorm, which `folded` replaces by one convolution."""
    found = [nn.Conv2d(inside, outside, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outside)]
    return nn.Sequential(*found, *([nn.ReLU()] if activation else []))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(layer(width, width), layer(width, width, activation=False))

    def forward(self, x):
        return F.relu(x + self.inner(x))


def mobilenet(width=16):
    blocks = [layer(1, width, stride=2)]
    for stride in (1, 2, 2):
        blocks += [layer(width, width, stride=stride, groups=width), layer(width, 2 * width, 1)]
        width *= 2
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def resnet(width=16):
    blocks = [layer(1, width, stride=2), Residual(width), layer(width, 2 * width, stride=2), Residual(2 * width)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def trained(make, x, y, epochs):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return folded(model.eval())


def folded(model):
    """Each BatchNorm multiplied into the convolution before it."""
    for module in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        if len(module) > 1 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model.requires_grad_()  # the new biases are frozen


def ranges(loss, parameters):
    """The objective: the squared range of every output and input channel, summed. For a channel between two layers it
    is (s r)² + (r'/s)², smallest where both ranges are √(r r'), as in cross-layer equalization."""
    found = 0.0
    for W in parameters.values():
        if W.ndim > 1:  # a depthwise convolution reads and writes the same rows
            rows, columns = W.flatten(1), W.transpose(0, 1).flatten(1) if W.shape[1] > 1 else W.flatten(1)
            found = found + rows.abs().amax(1).square().sum() + columns.abs().amax(1).square().sum()
    return found


@torch.no_grad()
def accuracy(model, x, y, round_to_int8):
    """Per cent right; with every weight rounded to a multiple of max |W| / 127, biases kept."""
    parameters = dict(model.named_parameters())
    if round_to_int8:
        for name, W in parameters.items():
            if W.ndim > 1:
                step = W.abs().max() / LEVELS
                parameters[name] = (W / step).round() * step
    output = torch.func.functional_call(model, parameters, (x,))
    return 100 * (output.argmax(1) == y).float().mean().item()


@torch.no_grad()
def shown(name, model, x, y, reference):
    """A line: accuracies with float and with int8 weights, how much smaller the ranges of the channels of a weight are
    than its own (the geometric mean: 1 is as good as it gets), the change of the output."""
    change = (model(x) - reference).norm() / reference.norm()
    shares = [W.flatten(1).abs().amax(1) / W.abs().max() for W in model.parameters() if W.ndim > 1]
    share = torch.cat(shares).clamp_min(1e-6).log().mean().exp()
    print(f"  {name:26}{accuracy(model, x, y, False):9.2f}{accuracy(model, x, y, True):9.2f}", end="")
    print(f"{share:10.2f}{change.item():12.1e}", flush=True)


def equalized(teleporter, x, steps):
    for _ in range(steps):
        teleporter.step(x, lambda output: output.sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options, start = parser.parse_args(), time.time()
    mnist = data.load("mnist-mini")
    x, y = mnist.x[: options.samples].view(-1, 1, 28, 28), mnist.y[: options.samples]
    tests, labels = mnist.x_test[: options.samples].view(-1, 1, 28, 28), mnist.y_test[: options.samples]
    print(f"{'':28}{'float %':>9}{'int8 %':>9}{'share':>10}{'change':>12}")
    for name, make in (("MobileNet-like", mobilenet), ("ResNet-like", resnet)):
        print(name)
        model = trained(make, x, y, options.epochs)
        reference = model(tests).detach()
        settings = {"objective": ranges, "maximize": False, "inputs": x[:2], "bound": 1.5}
        teleporter = Teleporter(model, **settings)
        shown("as trained", model, tests, labels, reference)
        equalized(teleporter, x[:2], options.steps)
        shown("equalized", model, tests, labels, reference)
        generator = torch.Generator().manual_seed(0)
        apart = [
            torch.randn(s.shape, generator=generator, dtype=torch.float64).clamp(-2, 2) for s in teleporter.symmetries
        ]
        teleporter.apply(apart)
        shown("channels scaled apart", model, tests, labels, reference)
        equalized(teleporter, x[:2], options.steps)
        shown("scaled apart, equalized", model, tests, labels, reference)
    print(f"{options.steps} steps each; {time.time() - start:.0f} s")
