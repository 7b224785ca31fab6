"""IntrinsicDimension: a random projection with orthonormal columns, against its matrix; at d = D it is full tuning."""
from math import gcd

import pytest
import torch

import slimtune as st
from slimtune.core import Bound
from slimtune.core.projection import PRIMES, project
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, loss, meta, output, randomize, site_io, tiny

IntrinsicDimension = st.methods.IntrinsicDimension
WORD = 2**64


def matrix(d: int, numbers: int, seed: int = 0) -> torch.Tensor:
    """P, (numbers, d)."""
    return torch.stack([project(axis, seed, numbers, 0, numbers) for axis in torch.eye(d, dtype=torch.double)], -1)


@pytest.mark.parametrize(("d", "numbers"), [(1, 9), (5, 17), (5, 20), (6, 10), (12, 12), (64, 1000), (97, 5000)])
def test_its_columns_are_orthonormal(d: int, numbers: int):
    P = matrix(d, numbers)
    torch.testing.assert_close(P.T @ P, torch.eye(d, dtype=torch.double), atol=1e-14, rtol=0)
    assert (P != 0).sum(1).eq(1).all()
    assert set((P != 0).sum(0).tolist()) <= {numbers // d, numbers // d + 1}
    assert numbers < 1000 or 0.45 < (P > 0).sum() / numbers < 0.55
    assert numbers < 20 or not torch.equal(P, matrix(d, numbers, seed=1))
    for start, stop in ((0, 1), (1, numbers - 2), (d - 1, numbers), (numbers // 2, numbers // 2 + 1)):
        piece = project(torch.arange(1.0, d + 1), 0, numbers, start, stop).double()
        torch.testing.assert_close(piece, (P @ torch.arange(1.0, d + 1).double())[start:stop], rtol=1e-6, atol=0)


def signed(word: int) -> int:
    return (word + WORD // 2) % WORD - WORD // 2


def mix(counter: int, key: int) -> int:
    word = (counter * 0x9E3779B97F4A7C15 + key) % WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = signed(word) ^ (signed(word) >> shift)
        word = word * factor % WORD
    return signed(word) ^ (signed(word) >> 31)


def test_it_is_made_of_whole_numbers_alone():
    """Cell by cell in Python's integers: what a seed means, in every file and on every device."""
    d, numbers, seed = 7, 40, 12345
    keys = [mix(i, seed) for i in range(4)]
    wanted = torch.zeros(numbers, d, dtype=torch.double)
    for i in range(numbers):
        k, r = divmod(i, d)
        a, b = (1, 0) if k == numbers // d else (PRIMES[mix(k, keys[0]) % 16], mix(k, keys[1]) % 2**31)
        word = ((mix(k, keys[2]) ^ mix(r, keys[3])) * 0x9E3779B1) % 2**32
        word = word - 2**32 if word >= 2**31 else word
        word = (word ^ (word >> 15)) * 0x85EBCA77 % 2**32
        wanted[i, (a * r + b) % d] = -1.0 if word >= 2**31 else 1.0
    torch.testing.assert_close(matrix(d, numbers, seed).sign(), wanted)
    assert all(gcd(p, n) == 1 for p in PRIMES for n in range(1, 2000))


def test_its_gradient_is_the_transposed_matrix():
    t, dy = torch.randn(2, 5, dtype=torch.double, requires_grad=True), torch.randn(2, 23, dtype=torch.double)
    found, = torch.autograd.grad(project(t, 3, 60, 7, 30), t, dy)
    torch.testing.assert_close(found, dy @ matrix(5, 60, 3)[7:30])


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("family", "site"), [("bert", "encoder.1.mlp.up"), ("gpt2", "decoder.1.attn.v"),
                                              ("vit", "vision.0.mlp.down"), ("t5", "decoder.1.cross.attn.o")])
def test_equation(family: str, site: str, structured: bool):
    """y + lambda x reshape(P theta)^T, with P's rows in the order of the sites."""
    method = IntrinsicDimension(dimension=30, structured=structured, sites=(site.split(".", 2)[2], "attn.q"), seed=4)
    delta = st.attach(tiny(family).double(), method)
    p, x, y, out = site_io(delta, site)
    places = [slot.site for _, slot in delta.slots]
    sizes = [s.d_in * s.d_out for s in places]
    number = [s.name for s in places].index(site)
    start, blocks = sum(sizes[:number]), list(dict.fromkeys((s.tower, s.block) for s in places))
    rows = matrix(len(p["theta"]), sum(sizes), 4)[start:start + sizes[number]]
    factor = p["factors"][blocks.index((places[number].tower, places[number].block))] if structured else 1.0
    wanted = y + factor * x @ (rows @ p["theta"]).view(y.shape[-1], x.shape[-1]).T
    torch.testing.assert_close(out, wanted)
    # theta was at work before this site as well: its gradient here alone is that of the equation
    again = delta.slots[number][1].method.forward(Bound(p, places[number], False), x, y)
    assert_equation(again, wanted, p)
    assert len(p["theta"]) == 30 - (len(blocks) if structured else 0)


@pytest.mark.parametrize("wide", [("theta",), ("factors",), ("theta", "factors")])
def test_each_example_may_have_its_own(wide):
    delta = st.attach(tiny("bert").double(), IntrinsicDimension(dimension=20, structured=True))
    slot = delta.slots[5][1]
    shapes = {"theta": (18,), "factors": (2,)}
    p = {n: torch.randn(*((3,) if n in wide else ()), *s, dtype=torch.double) for n, s in shapes.items()}
    x, y = torch.randn(3, 4, slot.site.d_in).double(), torch.randn(3, 4, slot.site.d_out).double()
    out = slot.method.forward(Bound(p, slot.site, False), x, y)
    for i in range(3):
        own = {n: t[i] if n in wide else t for n, t in p.items()}
        alone = slot.method.forward(Bound(own, slot.site, False), x[i:i + 1], y[i:i + 1])
        torch.testing.assert_close(out[i:i + 1], alone)


def test_as_many_numbers_as_weights_is_full_tuning():
    """Three steps of Adam on theta are three on the weights themselves."""
    tuned, plain = tiny("bert").double(), tiny("bert").double()
    delta = st.attach(tuned, IntrinsicDimension(dimension=2 * 32 * 64, sites=("mlp.up",), head="none"))
    weights = [layer.intermediate.dense.weight for layer in plain.bert.encoder.layer]
    losses = []
    for model, parameters in ((tuned, list(delta.parameters())), (plain, weights)):
        optimizer, own = torch.optim.Adam(parameters, lr=0.01), []
        for _ in range(3):
            optimizer.zero_grad()
            own.append(loss(model, batch("bert")))
            own[-1].backward()
            optimizer.step()
        losses.append(torch.stack(own))
    torch.testing.assert_close(*losses)
    assert losses[0][2] < losses[0][0]
    delta.merge()
    for mine, weight in zip(tuned.bert.encoder.layer, weights, strict=True):
        torch.testing.assert_close(mine.intermediate.dense.weight, weight)


@pytest.mark.parametrize("structured", [False, True])
def test_the_published_count(structured: bool):
    """arXiv 2106.04647, table 1: Intrinsic-SAID trains 20,000 numbers, 0.009 % of T5-base."""
    delta = st.attach(meta.t5_base_meta(vocab_size=32_100), IntrinsicDimension(structured=structured))
    found = delta.count()
    assert (found.backbone, found.trainable, f"{found.percent:.3f}") == (222_882_048, 20_000, "0.009")
    assert [p.numel() for p in delta.parameters()] == ([20_000 - 24, 24] if structured else [20_000])


def test_more_numbers_than_weights_are_refused():
    with pytest.raises(MethodError, match=r"2,048 numbers, and 2 factors are among them[\s\S]*Choose 3 to 2,050"):
        st.attach(tiny("bert"), IntrinsicDimension(sites=("attn.q",), structured=True))
    st.attach(tiny("bert"), IntrinsicDimension(sites=("attn.q",), structured=True, dimension=3), name="least")


def test_two_seeds_are_two_subspaces():
    outs = []
    for seed in (0, 1):
        model = tiny("bert")
        randomize(st.attach(model, IntrinsicDimension(dimension=8, seed=seed)))
        outs.append(output(model, batch("bert")))
    assert not torch.allclose(*outs)
