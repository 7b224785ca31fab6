"""SynFlow: conserved in every matrix of a chain; slow sums over paths; what is no chain is refused."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import BitFit, Compacter, LoRA, Pfeiffer
from slimtune.sparsity.synflow import SynFlow, flow
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import randomize, tiny


def scored(family, method, on="delta", **more):
    delta = attach(tiny(family).double(), method)
    seen = View(randomize(delta) if on == "delta" else delta, targets(delta, on, **more))
    return SynFlow().score(seen), seen


def test_flow_and_its_conservation_on_a_plain_chain():
    """R is the sum over all paths, and the scores of every layer add up to it."""
    torch.manual_seed(0)
    ws = [torch.rand(s).double().requires_grad_() for s in ((3, 2), (4, 3), (2, 4))]
    paths = sum(ws[0][j, i] * ws[1][k, j] * ws[2][m, k] for i in range(2) for j in range(3) for k in range(4)
                for m in range(2))
    torch.testing.assert_close(flow(ws), paths)
    for w, g in zip(ws, torch.autograd.grad(flow(ws), ws), strict=True):
        torch.testing.assert_close((w * g).sum(), paths)


@pytest.mark.parametrize(("method", "names"), [(Pfeiffer(bottleneck=3), ("down", "up")), (LoRA(rank=2), ("A", "B"))])
def test_of_an_added_pair(method, names):
    scores, seen = scored("bert", method)
    slots = {name.rpartition(".")[0] for name in scores}
    assert len(slots) > 1
    for slot in slots:
        first, second = (seen.weights[f"{slot}.{n}"].abs() for n in names)
        torch.testing.assert_close(scores[f"{slot}.{names[0]}"], first * second.sum(0)[:, None])
        torch.testing.assert_close(scores[f"{slot}.{names[1]}"], second * first.sum(1))


def test_of_a_backbone():
    scores, seen = scored("bert", BitFit(), "base", pooler=True)
    at = "own.bert.encoder.layer.1."
    w = {name.removeprefix(at).removesuffix(".weight"): t.abs() for name, t in seen.weights.items()}
    s = {name.removeprefix(at).removesuffix(".weight"): t for name, t in scores.items()}
    torch.testing.assert_close(s["intermediate.dense"], w["intermediate.dense"] * w["output.dense"].sum(0)[:, None])
    torch.testing.assert_close(s["output.dense"], w["output.dense"] * w["intermediate.dense"].sum(1))
    torch.testing.assert_close(s["attention.self.value"],
                               w["attention.self.value"] * w["attention.output.dense"].sum(0)[:, None])
    torch.testing.assert_close(s["attention.self.query"],
                               w["attention.self.query"] * w["attention.self.key"].sum(1)[:, None])
    pooler = "own.bert.pooler.dense.weight"
    torch.testing.assert_close(scores[pooler], seen.weights[pooler].abs())


def test_of_shared_heads_and_a_gate():
    """Llama's two keys and values serve four queries; its network has a gate."""
    scores, seen = scored("llama", LoRA(rank=1), "base")
    at = "own.model.layers.0."
    w = {name.removeprefix(at).split(".")[1]: t.abs() for name, t in seen.weights.items() if name.startswith(at)}
    s = {name.removeprefix(at).split(".")[1]: t for name, t in scores.items() if name.startswith(at)}
    out = w["o_proj"].sum(0).view(2, 2, 8).sum(1).flatten()  # by key head: of the two queries that share it
    torch.testing.assert_close(s["v_proj"], w["v_proj"] * out[:, None])
    queries = w["q_proj"].sum(1).view(2, 2, 8).sum(1).flatten()
    torch.testing.assert_close(s["k_proj"], w["k_proj"] * queries[:, None])
    torch.testing.assert_close(s["up_proj"], w["up_proj"] * (w["down_proj"].sum(0) * w["gate_proj"].sum(1))[:, None])
    for a, b in (("up_proj", "down_proj"), ("gate_proj", "up_proj"), ("v_proj", "o_proj"), ("q_proj", "k_proj")):
        torch.testing.assert_close(s[a].sum(), s[b].sum())


def test_of_a_fused_and_turned_projection():
    scores, seen = scored("gpt2", LoRA(rank=1), "base")
    at = "own.transformer.h.0."
    fused, out = scores[at + "attn.c_attn.weight"], scores[at + "attn.c_proj.weight"]
    w, o = seen.weights[at + "attn.c_attn.weight"].abs(), seen.weights[at + "attn.c_proj.weight"].abs()
    torch.testing.assert_close(fused[:, 64:], w[:, 64:] * o.sum(1))
    torch.testing.assert_close(fused[:, 64:].sum(), out.sum())
    torch.testing.assert_close(fused[:, :32].sum(), fused[:, 32:64].sum())


def test_a_part_of_a_chain_scores_as_with_all_of_it():
    every, _ = scored("bert", BitFit(), "base")
    some, _ = scored("bert", BitFit(), "base", sites=("mlp.up",), blocks=(0,))
    for name, s in some.items():
        torch.testing.assert_close(s, every[name])


def test_kronecker_factors_are_no_chain():
    with pytest.raises(MethodError, match="no chain"):
        scored("bert", Compacter())
