"""The low-rank add against its formula in plain torch: values, gradients, memory, transforms."""
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from slimtune.core import dropout, lowrank
from slimtune.core.dropout import Keep, draw_seed
from slimtune.core.lowrank import low_rank_add
from slimtune.errors import MethodError

D_IN, D_OUT, RANK = 10, 7, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def tensors(lead: tuple[int, ...] = (3, 4), dtype=torch.float64, examples: str = "", seed: int = 0,
            factors=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, A and B; `examples` names the factors that have an example axis."""
    g = torch.Generator().manual_seed(seed)
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    n = lead[:1]
    A, B = new(*(n if "A" in examples else ()), RANK, D_IN), new(*(n if "B" in examples else ()), D_OUT, RANK)
    x, dy = new(*lead, D_IN).to(dtype), new(*lead, D_OUT).to(dtype)
    return x.requires_grad_(), dy, *(t.to(factors or dtype).requires_grad_() for t in (A, B))


def frozen(dtype=torch.float64) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False).to(dtype)


def oracle(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """Per example, in a loop, in float64, with the mask that the seed gives."""
    y, x, A, B = (t.double() for t in (y, x, A, B))
    if p:
        keep = Keep(seed, p, math.prod(x.shape[:-1]), x.shape[-1])
        x = x * keep.mask(x.shape, x.dtype) * keep.scale
    if A.dim() == B.dim() == 2:
        return y + scale * (x @ A.T) @ B.T
    return torch.stack([y[i] + scale * (x[i] @ (A[i] if A.dim() == 3 else A).T) @ (B[i] if B.dim() == 3 else B).T
                        for i in range(len(x))])


def next_seed(state: int = 7) -> int:
    torch.manual_seed(state)
    seed = draw_seed()
    torch.manual_seed(state)
    assert isinstance(seed, int)
    return seed


@pytest.mark.parametrize("examples", ["", "A", "B", "AB"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "factors"), [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2,
                                                (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("chunk", [1 << 19, 16])
def test_equals_the_formula(examples, p, dtype, factors, chunk, monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK", chunk)
    monkeypatch.setattr(lowrank, "_LARGE", 0)             # oneDNN's product in float32 as well
    x, dy, A, B = tensors(dtype=dtype, examples=examples, factors=factors)
    linear, seed = frozen(dtype), next_seed()
    y = linear(x)
    expected = oracle(linear.double()(x.double()), x, A, B, 0.7, p, seed)
    out = low_rank_add(y, x, A, B, 0.7, p, training=True)
    assert out.dtype is dtype
    tol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tol, atol=tol * 2)
    got = torch.autograd.grad(out, (x, A, B), dy)
    for g, e, t in zip(got, torch.autograd.grad(expected, (x, A, B), dy.double()), (x, A, B), strict=True):
        assert (g.dtype, g.shape) == (t.dtype, t.shape)
        torch.testing.assert_close(g.double(), e.double(), rtol=tol, atol=tol * e.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(["", "A", "B", "AB"]), st.floats(0, 0.9),
       st.sets(st.sampled_from("xAB")))
def test_any_shape_and_any_frozen_subset(lead, examples, p, trained):
    if examples and not lead:
        examples = ""
    x, dy, A, B = tensors(tuple(lead), examples=examples)
    inputs = {"x": x, "A": A, "B": B}
    for name, t in inputs.items():
        t.requires_grad_(name in trained)
    seed = next_seed()
    out = low_rank_add(frozen()(x), x, A, B, 1.5, p, training=True)
    expected = oracle(frozen()(x), x, A, B, 1.5, p, seed)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.requires_grad == bool(trained)
    if trained:
        wanted = [inputs[n] for n in sorted(trained)]
        torch.testing.assert_close(torch.autograd.grad(out, wanted, dy), torch.autograd.grad(expected, wanted, dy),
                                   rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("examples", ["", "AB"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_first_and_second_derivatives(examples, p):
    x, _, A, B = tensors((2, 2), examples=examples)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)

    def f(x, A, B):
        torch.manual_seed(3)
        return low_rank_add(F.linear(x, weight), x, A, B, 0.5, p, training=True)

    assert gradcheck(f, (x, A, B), check_forward_ad=True)
    assert gradgradcheck(f, (x, A, B))


def test_double_backward_with_frozen_a_says_what_is_missing():
    x, dy, A, B = tensors()
    out = low_rank_add(frozen()(x), x, A.requires_grad_(False), B, 1.0)
    with pytest.raises(RuntimeError, match="x, which is not saved while A is frozen"):
        torch.autograd.grad(out, (x, B), dy, create_graph=True)
    fixed, weight = x.detach(), frozen()(x).detach()      # x is data here: B's gradient does not depend on it
    assert gradgradcheck(lambda B: low_rank_add(weight.clone(), fixed, A, B, 1.0), (B,))


def test_dropout_only_in_training():
    x, _, A, B = tensors()
    state = torch.get_rng_state()
    out = low_rank_add(frozen()(x), x, A, B, 1.0, 0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)      # nothing is drawn
    torch.testing.assert_close(out, oracle(frozen()(x), x, A, B, 1.0))


# In place, and where it is not allowed

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_adds_into_the_linears_output(bias, grad):
    x, dy, A, B = tensors()
    linear = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    expected = oracle(linear(x), x, A, B, 2.0)
    with torch.set_grad_enabled(grad):
        y = linear(x)
        out = low_rank_add(y, x, A, B, 2.0)
    assert out.data_ptr() == y.data_ptr()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(y, expected)
    if grad:
        for result in (out, y):                           # y's own history is the new one as well
            got = torch.autograd.grad(result, x, dy, retain_graph=True)
            torch.testing.assert_close(got, torch.autograd.grad(expected, x, dy, retain_graph=True))


def test_two_deltas_on_one_output():
    x, dy, A, B = tensors()
    y = frozen()(x)
    out = low_rank_add(low_rank_add(y, x, A, B, 2.0), x, A * 2, B, 1.0)
    expected = oracle(oracle(frozen()(x), x, A, B, 2.0), x, A * 2, B, 1.0)
    assert out.data_ptr() == y.data_ptr()
    torch.testing.assert_close(torch.autograd.grad(out, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy))


@pytest.mark.parametrize("examples", ["", "AB"])
def test_slices_of_a_fused_projection(examples):
    """As GPT-2's c_attn: q and v of one addmm, seen through a view, are changed in place."""
    x, _, A, B = tensors(examples=examples)
    weight, bias = torch.randn(D_IN, 3 * D_OUT, dtype=torch.float64), torch.randn(3 * D_OUT, dtype=torch.float64)
    dy = torch.randn(3, 4, 3 * D_OUT, dtype=torch.float64)

    def fused():
        return torch.addmm(bias, x.view(-1, D_IN), weight).view(3, 4, 3 * D_OUT)

    out, seed = fused(), next_seed()
    q, v = out[..., :D_OUT], out[..., 2 * D_OUT:]
    assert low_rank_add(q, x, A, B, 0.5, 0.2, training=True) is q
    assert low_rank_add(v, x, A, 2 * B, 0.5) is v
    y = fused()
    expected = torch.cat([oracle(y[..., :D_OUT], x, A, B, 0.5, 0.2, seed), y[..., D_OUT:2 * D_OUT],
                          oracle(y[..., 2 * D_OUT:], x, A, 2 * B, 0.5)], -1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy))


def test_a_transposed_output():
    x, dy, A, B = tensors()
    y = frozen()(x).transpose(0, 1).contiguous().transpose(0, 1)
    assert not y.is_contiguous()
    expected = oracle(y, x, A, B, 0.5)
    out = low_rank_add(y, x, A, B, 0.5)
    assert out.data_ptr() == y.data_ptr()
    expected_gradients = torch.autograd.grad(expected, (x, A, B), dy, retain_graph=True)   # y's graph is in both
    torch.testing.assert_close(torch.autograd.grad(out, (x, A, B), dy), expected_gradients)


def test_what_may_not_change_does_not():
    x, _, _, _ = tensors()
    A, B = torch.randn(RANK, D_IN, dtype=torch.float64), torch.randn(D_IN, RANK, dtype=torch.float64)
    A.requires_grad_()
    leaf = torch.randn(3, 4, D_IN, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        inference = torch.randn(3, 4, D_IN, dtype=torch.float64)
    piece = nn.Linear(D_IN, 2 * D_IN, dtype=torch.float64)(x).split(D_IN, -1)[1]
    for y in (leaf, leaf[:], x, x.view(x.shape), inference, piece):
        before = y.detach().clone()
        out = low_rank_add(y, x, A, B, 0.5)
        assert torch.equal(y, before)
        torch.testing.assert_close(out, oracle(y, x, A, B, 0.5))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), A), torch.autograd.grad(
            oracle(before, x, A, B, 0.5).sum(), A))
    low_rank_add(leaf, x, A, B, 0.5).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_a_y_saved_elsewhere_raises_and_is_not_silently_wrong():
    x, _, A, B = tensors()
    y = frozen()(x).sigmoid()                             # sigmoid keeps its output for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        low_rank_add(y, x, A, B, 0.5).sum().backward()


def test_inference_mode_works_in_place():
    x, _, A, B = tensors()
    with torch.inference_mode():
        y = frozen()(x)
        assert low_rank_add(y, x, A, B, 0.5) is y
    torch.testing.assert_close(y.clone(), oracle(frozen()(x), x, A, B, 0.5).detach())


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"dropout": -0.5}, {"A": (2, RANK, D_IN)}, {"B": (4, D_OUT, RANK)}])
def test_errors_say_what_to_do(bad):
    x, _, A, B = tensors()
    A, B = (torch.zeros(bad[n]) if n in bad else t for n, t in (("A", A), ("B", B)))
    with pytest.raises(MethodError, match=r"dropout is|example axis"):
        low_rank_add(frozen()(x), x, A, B, 1.0, bad.get("dropout", 0.0), training=True)


# What is saved

class Stack(nn.Module):
    """Attention-like blocks of frozen linears: q, k, v share x. LoRA on every linear, or on none."""

    def __init__(self, lora: bool, p: float, dtype: torch.dtype, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(5 * blocks))
        self.requires_grad_(False).to(dtype)
        self.lora, self.p = lora, p
        self.A = nn.ParameterList(0.1 * torch.randn(RANK, width) for _ in self.linears)
        self.B = nn.ParameterList(0.1 * torch.randn(width, RANK) for _ in self.linears)

    def at(self, i: int, x: Tensor) -> Tensor:
        y = self.linears[i](x)
        return low_rank_add(y, x, self.A[i], self.B[i], 0.5, self.p, self.training) if self.lora else y

    def block(self, i: int, x: Tensor) -> Tensor:
        q, k, v = (self.at(i + j, x) for j in range(3))
        x = F.layer_norm(x + self.at(i + 3, torch.sin(q) * torch.cos(k) * v), x.shape[-1:])
        return x + F.gelu(self.at(i + 4, x))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self.linears), 5):
            x = self.block(i, x)
        return x


def saved_bytes(model: nn.Module, x: Tensor) -> dict[int, int]:
    """Bytes of each storage saved for backward, parameters and the input apart."""
    held: dict[int, Tensor] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t          # kept alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return {key: t.untyped_storage().nbytes() for key, t in held.items() if key not in known}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes_are_the_frozen_ones_and_rank_sized_terms(dtype, p):
    """LoRA on all linears adds, a linear, one product of rank width, and the inputs shared between siblings."""
    x = torch.randn(4, 16, 64).to(dtype).requires_grad_()
    lora = saved_bytes(Stack(True, p, dtype), x)
    base = saved_bytes(Stack(False, p, dtype), x)
    tokens, size = 4 * 16, dtype.itemsize
    full = tokens * 64 * size
    assert sorted(b for b in lora.values() if b < full) == sorted(
        [b for b in base.values() if b < full] + [tokens * RANK * size] * 15)
    # Every other tensor is one that the frozen model saves too, or the input of projections, once for q, k
    # and v: three inputs a block, where the first is the model's own. dA needs these at any rank.
    assert sum(b >= full for b in lora.values()) == sum(b >= full for b in base.values()) + 3 * 3 - 1
    assert sum(lora.values()) == sum(saved_bytes(Stack(True, 0.0, dtype), x).values())   # no mask, no dropped copy


def test_siblings_save_one_x_and_it_is_x():
    x, _, A, B = tensors()
    linear, saved = frozen(), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sum(low_rank_add(linear(x), x, A, B, 0.5, 0.1, training=True) for _ in range(3))
    of_x = [t for t in saved if t.data_ptr() == x.data_ptr()]
    assert len(of_x) == 3
    rest = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() != x.data_ptr()}
    assert sorted(rest.values()) == sorted([A.numel(), B.numel(), linear.weight.numel(), *[12 * RANK] * 3])


def test_frozen_factors_save_less():
    x, _, A, B = tensors()
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_add(frozen()(x), x, A.detach(), B, 0.5, 0.1, training=True)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)


# Under torch's other machinery

@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant):
    model, x = Stack(True, 0.3, torch.float64), torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for ckpt in (False, True):
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=reentrant) if ckpt else model(x)
        torch.rand(3)                                     # the generator moves on before backward
        results.append((y, *torch.autograd.grad(y.sum(), (x, *model.A, *model.B))) if not (ckpt and reentrant)
                       else (y, *backward(y, x, model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def backward(y: Tensor, x: Tensor, model: Stack) -> list[Tensor]:
    y.sum().backward()
    return [t.grad for t in (x, *model.A, *model.B)]  # type: ignore[misc]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_gives_the_same_numbers(p):
    model, x = Stack(True, p, torch.float64, blocks=1), torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        torch.manual_seed(5)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, *model.A, *model.B))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model, x = Stack(True, 0.3, torch.float64, blocks=1).train(training), torch.randn(2, 3, 64, dtype=torch.float64)
    program = torch.export.export(model, (x,)).module()
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    torch.testing.assert_close(program(x), expected, rtol=1e-12, atol=1e-12)
    assert any("randint" in str(n.target) for n in program.graph.nodes) == training


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_functional_transforms(p):
    x, _, A, B = tensors()
    linear = frozen()

    def loss(x, A, B):
        torch.manual_seed(5)
        return (low_rank_add(linear(x), x, A, B, 0.5, p, training=True) ** 2).sum()

    expected = torch.autograd.grad(loss(x, A, B), (x, A, B))
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(x, A, B), expected)
    value, slope = torch.func.jvp(loss, (x, A, B), (x, A, B))
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(expected, (x, A, B), strict=True)))
    torch.testing.assert_close(value, loss(x, A, B))


def test_vmap_is_the_example_axis():
    x, dy, A, B = tensors(examples="AB")
    linear = frozen()

    def per_example(x, A, B):
        return low_rank_add(linear(x), x, A, B, 0.5)

    torch.testing.assert_close(torch.func.vmap(per_example)(x, A, B), low_rank_add(linear(x), x, A, B, 0.5))
    out = torch.func.vmap(lambda x: low_rank_add(linear(x), x, A[0], B[0], 0.5, 0.3, training=True),
                          randomness="different")(x)
    torch.testing.assert_close(out.shape, dy.shape)


def test_example_axis_gradients_are_per_example():
    x, dy, A, B = tensors()
    out = low_rank_add(frozen()(x), x, a := A.detach().expand(3, -1, -1).requires_grad_(),
                       b := B.detach().expand(3, -1, -1).requires_grad_(), 0.5)
    got = torch.autograd.grad(out, (a, b), dy)
    for i in range(3):
        one = low_rank_add(frozen()(x[i]), x[i], A, B, 0.5)
        torch.testing.assert_close(tuple(g[i] for g in got), torch.autograd.grad(one, (A, B), dy[i]))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p):
    """x stays float32, the linear gives bfloat16, the factors are float32 masters."""
    x, dy, A, B = tensors(dtype=torch.float32)
    seed = next_seed()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(torch.float32)(x)
        out = low_rank_add(y, x, A, B, 0.5, p, training=True)
        got = torch.autograd.grad(out, (x, A, B), dy.bfloat16())     # autocast is on in backward too
    assert out.dtype is torch.bfloat16
    assert out.data_ptr() == y.data_ptr()
    expected = oracle(frozen(torch.float32)(x), x, A, B, 0.5, p, seed)
    torch.testing.assert_close(out.double(), expected, rtol=6e-2, atol=0.1)
    for g, e, t in zip(got, torch.autograd.grad(expected, (x, A, B), dy.double()), (x, A, B), strict=True):
        assert g.dtype is t.dtype
        torch.testing.assert_close(g.double(), e.double(), rtol=6e-2, atol=6e-2 * e.abs().max().item())


def test_other_gradients_of_x_accumulate_into_dx():
    """dx is no view, so autograd adds the frozen linear's gradient into it instead of allocating another."""
    x, dy, A, B = tensors()
    out = low_rank_add(frozen()(x), x, A, B, 0.5, 0.3, training=True)
    node, seen = out.grad_fn.next_functions[0][0], []     # out is a view of the product that was added to
    node.register_hook(lambda given, _: seen.append((given[1].shape, given[1]._base)))
    torch.autograd.grad(out, x, dy)
    assert seen == [(x.shape, None)]
