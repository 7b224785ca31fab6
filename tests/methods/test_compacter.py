"""Compacter against its paper: y + W_up GELU(W_down y), W = sum_i A_i (x) (s_i t_i), one set of A_i for all."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError
from slimtune.testing import assert_equation, batch, output, randomize, site_io, tiny

Compacter = st.methods.Compacter


def product(A, s, t):
    return sum(torch.kron(A[i], s[i] @ t[i]) for i in range(len(A)))


def adapter(p, y):
    A = {n: p.get(f"{n}_A", p.get("A")) for n in ("down", "up")}
    h = F.gelu(y @ product(A["down"], p["down_s"], p["down_t"]) + p["down_bias"], approximate="tanh")
    return y + h @ product(A["up"], p["up_s"], p["up_t"]) + p["up_bias"]


@pytest.mark.parametrize(("family", "site"), [
    ("t5", "decoder.0.attn"), ("t5", "encoder.0.attn"), ("bert", "encoder.0.attn"), ("gpt2", "decoder.0.attn")])
@pytest.mark.parametrize("values", [{}, {"rank": 2, "division": 2}], ids=["rank 1", "rank 2"])
def test_equation(family: str, site: str, values: dict[str, int]):
    """At the first site: at a later one, the gradient of the shared A comes from the sites before as well."""
    p, _, y, out = site_io(st.attach(tiny(family).double(), Compacter(bottleneck=8, **values)), site)
    assert_equation(out, adapter(p, y), p)


def test_equation_without_a_shared_rule():
    p, _, y, out = site_io(st.attach(tiny("t5").double(), Compacter(bottleneck=8, shared_rule=False)), "decoder.1.mlp")
    assert "A" not in p
    assert_equation(out, adapter(p, y), p)


def test_the_whole_model_in_plain_hooks():
    """T5: behind the self-attention and feed-forward network of each block, not behind the cross-attention."""
    model, inputs = tiny("t5").double(), batch("t5")
    delta = randomize(st.attach(model, Compacter(bottleneck=8, norms="none")))
    own, state = output(model, inputs), delta.state()
    grads = torch.autograd.grad(own.sum(), list(delta.parameters()))
    names = [n for n, _ in delta.named_parameters()]
    delta.detach()
    leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
    for tower, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, block in enumerate(stack.block):
            for role, module in (("attn", block.layer[0].SelfAttention), ("mlp", block.layer[-1].DenseReluDense)):
                p = {n: leaves[f"{tower}.{i}.{role}.compacter.{n}"] for n in (
                    "down_s", "down_t", "down_bias", "up_s", "up_t", "up_bias")} | {"A": leaves["shared.compacter.A"]}
                module.register_forward_hook(lambda m, a, out, p=p: (adapter(p, out[0]), *out[1:])
                                             if isinstance(out, tuple) else adapter(p, out))
    wanted = output(model, inputs)
    torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.sum(), [leaves[n] for n in names]))
    assert all(g.any() for g in grads)


def test_what_it_trains():
    """A once; adapters after self-attention and feed-forward network; all norms, and nothing else."""
    model = tiny("t5")
    delta = st.attach(model, Compacter(bottleneck=8))
    names = [n for n, _ in delta.named_parameters()]
    assert [n for n in names if n.rpartition(".")[2] == "A"] == ["shared.compacter.A"]
    sites = {n.partition(".compacter.")[0] for n in names if not n.startswith(("shared", "own"))}
    assert sites == {f"{tower}.{place}" for tower in ("encoder", "decoder")
                     for place in ("0.attn", "0.mlp", "1.attn", "1.mlp")}
    norms = [n for n, _ in model.named_parameters() if "layer_norm" in n]
    assert sorted(n.removeprefix("own.") for n in names if n.startswith("own")) == sorted(norms)
    assert [p.shape for n, p in delta.named_parameters() if n.endswith(".A")] == [(4, 4, 4)]
    shared = [slot.bind(torch.zeros(1)).values["A"] for _, slot in delta.slots]
    assert all(a is shared[0] for a in shared)


def test_the_start():
    """A from N(0, 1e-4), s and t Xavier-uniform with gain sqrt(2); the shift is of the order of A^2."""
    state = st.attach(tiny("bert", hidden_size=256), Compacter(division=16, bottleneck=16)).state()
    assert 0.9e-4 < state["shared.compacter.A"].std() < 1.1e-4
    s = state["encoder.0.attn.compacter.down_s"]
    bound = (2 * 6 / (256 / 16 + 1))**0.5
    assert 0.9 * bound < s.abs().max() <= bound
    model, inputs = tiny("bert"), batch("bert")
    before = output(model, inputs)
    st.attach(model, Compacter(bottleneck=8))
    torch.testing.assert_close(output(model, inputs), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("values", "choice"), [
    ({"bottleneck": 6}, "1 2"), ({"bottleneck": 12, "division": 3}, "1 2 4")])
def test_a_division_must_divide(values: dict[str, int], choice: str):
    with pytest.raises(MethodError, match=f"Choose a division of {choice}, or another bottleneck"):
        st.attach(tiny("bert"), Compacter(**values))


def test_it_has_one_start():
    """The factors start as the paper says; a setting that would change nothing is not taken."""
    with pytest.raises(MethodError, match="init"):
        st.methods.Compacter(init="lora")
    with pytest.raises(MethodError, match="init"):
        st.methods.LowRankAdapter(init="bert")
