"""Ensembles along the data-dependent action: members, votes, controls, attacks."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, normal

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import symmetry_ensemble as se

SHAPE = (1, 6, 8)
SIGMAS = [se.LEAKY_RELU, se.SQUARED_LEAKY_RELU]
ids = [sigma.name for sigma in SIGMAS]


@pytest.fixture
def net():
    generator = torch.Generator().manual_seed(1)
    return se.ConvNet(*(p.double() for p in se.initialize(SHAPE, generator)))


@pytest.fixture
def images():
    return torch.rand(300, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# The network


def test_hidden_input_is_the_published_network(net, images):
    maps = F.leaky_relu(F.conv2d((images - 0.5).view(-1, *SHAPE), net.K, net.a, padding=1), 0.01)
    expected = net.V @ F.max_pool2d(maps, 2).flatten(1).T + net.b
    torch.testing.assert_close(se.hidden_input(net, images, SHAPE), expected)


def test_odd_images_are_rejected():
    with pytest.raises(ValueError, match="even"):
        se.initialize((1, 7, 8), torch.Generator())


@pytest.mark.parametrize("sigma", SIGMAS, ids=ids)
def test_training_learns_and_repeats(images, sigma):
    x, y = images.float(), (images[:, :24].sum(1) > 12).long()
    nets = [se.train(x, y, SHAPE, sigma, epochs=12, seed=3) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(*nets))
    H = se.hidden_input(nets[0], x, SHAPE).double()
    assert (se.predict(nets[0], se.original(nets[0]), H, sigma) == y).double().mean() > 0.8


def test_derivative_of_the_squared_activation():
    z = torch.tensor([-2.0, -0.3, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(se.SQUARED_LEAKY_RELU.f(z).sum(), z)
    torch.testing.assert_close(se.SQUARED_LEAKY_RELU.derivative(z), slope)


def test_split_holds_out_the_last_fifth():
    class Data:
        x, y = torch.arange(100)[:, None], torch.arange(100)

    (x, _), (held_out, labels) = se.split(Data, 50)
    assert x[:, 0].tolist() == list(range(40)) and labels.tolist() == list(range(40, 50)) == held_out[:, 0].tolist()


# Ensembles


def group(net, images, sigma, epsilon=1.0, n=6):
    H = se.batches(se.hidden_input(net, images, SHAPE), n, 16)
    return H, se.ensemble("group", se.draw(n, 0), epsilon, H, sigma)


@pytest.mark.parametrize("sigma", SIGMAS, ids=ids)
def test_transformed_models_agree_with_the_original_on_the_batch_that_defined_pi_and_only_there(net, images, sigma):
    for epsilon in (1e-3, 0.1, 1.0):
        H, members = group(net, images, sigma, epsilon)
        at_rest = se.logits(net, se.original(net), H, sigma)
        assert se.relative_change(se.logits(net, members, H, sigma), at_rest).max() <= 1e-9
        new = se.hidden_input(net, images[96:], SHAPE)
        change = se.relative_change(
            se.logits(net, members, new, sigma), se.logits(net, se.original(net), new, sigma)
        ).median()
        assert change > epsilon / 100


@pytest.mark.parametrize("sigma", SIGMAS, ids=ids)
def test_all_members_at_once_are_the_transformed_networks_one_by_one(net, images, sigma):
    """Stacking the last two layers is the same as building each network with weights gV, gb, Uπ and running it."""
    _, (g, pi) = group(net, images, sigma)
    stacked = se.logits(net, (g, pi), se.hidden_input(net, images, SHAPE), sigma)
    for k in range(len(g)):
        moved = net._replace(V=g[k] @ net.V, b=g[k] @ net.b, U=net.U @ pi[k])
        alone = moved.U @ sigma.f(se.hidden_input(moved, images, SHAPE)) + moved.c
        torch.testing.assert_close(stacked[k], alone)


def test_batches_are_dealt_in_order_and_again_from_the_start():
    H = torch.arange(14.0).view(2, 7)
    dealt = se.batches(H, 3, 4)
    assert dealt.shape == (3, 2, 4)
    torch.testing.assert_close(dealt[0], H[:, :4])
    torch.testing.assert_close(dealt[1], H[:, [4, 5, 6, 0]])


def test_controls():
    n, sigma, eye = 5, se.LEAKY_RELU, torch.eye(16, dtype=torch.float64)
    draws, H = se.draw(n, 0), normal(0, n, 16, 16)
    g, pi = se.ensemble("group", draws, 0.5, H, sigma)
    torch.testing.assert_close(g, torch.linalg.matrix_exp(0.5 * draws.T))
    assert (draws.P.sum(1) == 1).all() and (draws.P.sum(2) == 1).all()
    made = {arm: se.ensemble(arm, draws, 0.5, H, sigma) for arm in se.ARMS}
    for arm in ("inverse", "random", "shuffled"):
        torch.testing.assert_close(made[arm][0], g)
    for arm in ("inverse", "interpolated_permutation"):
        torch.testing.assert_close(made[arm][1] @ made[arm][0], eye.expand(n, 16, 16))
    interpolated = made["interpolated_permutation"][0]
    torch.testing.assert_close(interpolated, (1.25 * eye + 0.25 * draws.P) / 1.5)
    torch.testing.assert_close(made["random"][1], eye + 0.5 * draws.R)
    shuffled = made["shuffled"][1]
    torch.testing.assert_close(shuffled[:, :, draws.units.argsort()], pi[draws.elements])
    with pytest.raises(ValueError, match="choose one of"):
        se.ensemble("none", draws, 0.5, H, sigma)


def test_draws_depend_on_the_seed_alone():
    assert all(torch.equal(a, b) for a, b in zip(se.draw(3, 1), se.draw(3, 1)))
    assert not torch.equal(se.draw(3, 1).T, se.draw(3, 2).T)


def test_votes_and_losses_are_those_of_the_first_members(net):
    outputs, y, counts = normal(0, 9, 10, 30), torch.arange(30) % 10, (1, 4, 9)
    votes, losses = se.vote(outputs, counts), se.losses(outputs, y, counts)
    for i, count in enumerate(counts):
        assert torch.equal(votes[i], outputs[:count].argmax(1).mode(0).values)
        probability = outputs[:count].softmax(1).mean(0)
        torch.testing.assert_close(losses[i], F.nll_loss(probability.log().T, y, reduction="none"))
    H = normal(1, 16, 250)
    members = normal(2, 7, 16, 16), normal(3, 7, 16, 16)
    whole = se.vote(se.logits(net, members, H, se.LEAKY_RELU), [7])[0]
    assert torch.equal(se.predict(net, members, H, se.LEAKY_RELU), whole)


# Attacks


def test_input_gradient_is_that_of_the_ensembles_loss(net, images):
    _, members = group(net, images, se.LEAKY_RELU, 0.5)
    x, y = images[:130], torch.arange(130) % 10  # more than one chunk
    gradient = se.input_gradient(net, members, x, y, SHAPE, se.LEAKY_RELU)

    def loss(x):
        return se.losses(se.logits(net, members, se.hidden_input(net, x, SHAPE), se.LEAKY_RELU), y, [6]).sum()

    direction = normal(4, *x.shape)
    difference = (loss(x + 1e-7 * direction) - loss(x - 1e-7 * direction)) / 2e-7
    assert abs(difference - (gradient * direction).sum()) <= 1e-4 * difference.abs()  # a kink may lie in between


def test_fgsm_moves_every_pixel_by_the_radius_and_stays_in_range():
    w, x = normal(0, 20), torch.rand(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still, moved = se.fgsm(lambda z: w.expand_as(z), x, [0.0, 0.1])
    assert torch.equal(still, x)
    torch.testing.assert_close(moved, (x + 0.1 * w.sign()).clamp(0, 1))


def test_pgd_climbs_within_its_ball():
    target, x = torch.full((2, 20), 0.9).double(), torch.full((2, 20), 0.5).double()
    path = se.pgd(lambda z: z - target, x, 4, radius=0.25, step=0.1)  # away from the target: down
    for z, expected in zip(path, (0.5, 0.4, 0.3, 0.25, 0.25), strict=True):
        torch.testing.assert_close(z, torch.full_like(z, expected))
    noisy = se.pgd(lambda z: z - target, x, 1, radius=0.25, step=0.1, noise=torch.ones(2, 20), low=0.45)
    torch.testing.assert_close(noisy[0], torch.full_like(x, 0.75))
    torch.testing.assert_close(noisy[1], torch.full_like(x, 0.65))
