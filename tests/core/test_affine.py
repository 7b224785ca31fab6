"""Affine maps against loops over examples, with an example axis on any of their arguments."""
from itertools import product

import pytest
import torch

from slimtune.core.affine import affine, layer_norm, scalar, vector

B, D_IN, D_OUT = 3, 5, 4


def tensor(*shape: int, axis: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((B, *shape) if axis else shape, dtype=torch.float64, generator=generator).requires_grad_()


def one(t, i: int, axis: bool):
    return t[i] if axis else t


def assert_same(out, wanted, inputs):
    """Two results and their gradients."""
    torch.testing.assert_close(out, wanted)
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dy), torch.autograd.grad(wanted, inputs, dy))


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize(("of_weight", "of_bias"), [*product((False, True), repeat=2), (False, None), (True, None)])
def test_affine(lead, of_weight, of_bias):
    if not lead and (of_weight or of_bias):
        lead = (1,)  # an example has tokens
    x, weight = tensor(B, *lead, D_IN), tensor(D_OUT, D_IN, axis=of_weight, seed=1)
    bias = None if of_bias is None else tensor(D_OUT, axis=of_bias, seed=2)
    wanted = torch.stack([
        (x[i, ..., None, :] * one(weight, i, of_weight)).sum(-1) + (0 if bias is None else one(bias, i, of_bias))
        for i in range(B)])
    assert_same(affine(x, weight, bias), wanted, [t for t in (x, weight, bias) if t is not None])


@pytest.mark.parametrize("axis", [False, True])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_vector_and_scalar(lead, axis):
    y, v, s = tensor(B, *lead, D_OUT), tensor(D_OUT, axis=axis, seed=1), tensor(axis=axis, seed=2)
    assert_same(vector(v, y) * y, torch.stack([one(v, i, axis) * y[i] for i in range(B)]), [y, v])
    assert_same(scalar(s, y) * y, torch.stack([one(s, i, axis) * y[i] for i in range(B)]), [y, s])


@pytest.mark.parametrize(("of_weight", "of_bias"), product((False, True), repeat=2))
def test_layer_norm(of_weight, of_bias):
    x, weight, bias = tensor(B, 4, D_IN), tensor(D_IN, axis=of_weight, seed=1), tensor(D_IN, axis=of_bias, seed=2)

    def plain(row, w, b):
        centred = row - row.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w + b

    wanted = torch.stack([torch.stack([plain(row, one(weight, i, of_weight), one(bias, i, of_bias)) for row in x[i]])
                          for i in range(B)])
    assert_same(layer_norm(x, weight, bias), wanted, [x, weight, bias])
