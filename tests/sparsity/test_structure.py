"""Scores of gates against sums over the weights that a head or neuron would take with it."""
import pytest
import torch

import slimtune as st
from slimtune.sparsity.criterion import Criterion
from slimtune.sparsity.prune import prune
from slimtune.sparsity.structure import gate_scores
from slimtune.sparsity.target import targets
from slimtune.testing import tiny


def bert(layer, kind, j):
    at = layer.attention
    if kind == "mlp.act":
        return [layer.intermediate.dense.weight[j], layer.output.dense.weight[:, j]]
    rows = slice(j * 8, j * 8 + 8)
    return [*(m.weight[rows] for m in (at.self.query, at.self.key, at.self.value)), at.output.dense.weight[:, rows]]


def llama(layer, kind, j):
    at, mlp = layer.self_attn, layer.mlp
    if kind == "mlp.act":
        return [mlp.up_proj.weight[j], mlp.gate_proj.weight[j], mlp.down_proj.weight[:, j]]
    own, queries = slice(j * 8, j * 8 + 8), slice(j * 16, j * 16 + 16)  # two heads of queries share one of keys
    return [at.q_proj.weight[queries], at.k_proj.weight[own], at.v_proj.weight[own], at.o_proj.weight[:, queries]]


def gpt2(layer, kind, j):
    if kind == "mlp.act":
        return [layer.mlp.c_fc.weight[:, j], layer.mlp.c_proj.weight[j]]
    own = slice(j * 8, j * 8 + 8)
    fused = [layer.attn.c_attn.weight[:, i * 32:(i + 1) * 32][:, own] for i in range(3)]
    return [*fused, layer.attn.c_proj.weight[own]]


CASES = {"bert": (bert, lambda m: m.bert.encoder.layer), "llama": (llama, lambda m: m.model.layers),
         "gpt2": (gpt2, lambda m: m.transformer.h)}


@pytest.mark.parametrize("family", CASES)
def test_the_sum_over_what_would_go(family):
    model = tiny(family).double()
    delta = st.attach(model, st.methods.Gates())
    gates, base = targets(delta, "gates"), targets(delta, "base")
    found = gate_scores(delta, gates, {n: t.parameter.detach() ** 2 for n, t in base.items()})
    parts, layers = CASES[family][0], CASES[family][1](model)
    for name, score in found.items():
        site = gates[name].sites[0]
        assert len(score) == {"attn.heads": 2 if family == "llama" else 4, "mlp.act": 64}[site.role]
        slow = [sum(float((w ** 2).sum()) for w in parts(layers[site.block], site.role, j)) for j in range(len(score))]
        torch.testing.assert_close(score.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_dead_weight_adds_nothing():
    class Flat(Criterion):
        def score(self, view):
            return {name: torch.ones_like(w) for name, w in view.weights.items()}

    delta = st.attach(tiny("bert"), st.methods.Gates())
    mask = torch.ones(64, 32, dtype=torch.bool)
    mask[5] = False
    for i in (0, 1):
        delta.set_masks({**delta.masks, f"own.bert.encoder.layer.{i}.intermediate.dense.weight": mask})
    prune(delta, 2 / 136, Flat(), on="gates", by="weights")
    dead = {(n, i) for n, m in delta.masks.items() if "gates" in n for i in (~m).nonzero().flatten().tolist()}
    assert dead == {("encoder.0.mlp.act.gates.c", 5), ("encoder.1.mlp.act.gates.c", 5)}
