"""Every criterion, on weights that are stored either way and on images: half goes, and nothing else moves."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, Gates, LoRA, Pfeiffer
from slimtune.sparsity.criterion import criteria, criterion_config
from slimtune.sparsity.fisher import Fisher
from slimtune.sparsity.grasp import GraSP
from slimtune.sparsity.l0 import L0
from slimtune.sparsity.movement import Movement
from slimtune.sparsity.obert import OBERT
from slimtune.sparsity.prune import prune
from slimtune.sparsity.snip import SNIP
from slimtune.sparsity.sparsegpt import SparseGPT
from slimtune.sparsity.synflow import SynFlow
from slimtune.sparsity.target import targets
from slimtune.sparsity.taylor import Taylor
from slimtune.sparsity.view import View
from slimtune.sparsity.wanda import Wanda
from slimtune.testing import batch, output, randomize, tiny

ALL = [SNIP(), GraSP(), SynFlow(), Taylor(), Fisher(), OBERT(block=20), Wanda(), SparseGPT(), L0(steps=2)]


def name(rule):
    return type(rule).__name__


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("rule", ALL, ids=name)
def test_on_a_backbone(rule, family):
    delta = attach(tiny(family), Full())
    delta.model.train()
    before = {n: w.clone() for n, w in delta.state().items()}
    chosen = targets(delta, "base", blocks=(1,))
    found = prune(delta, 0.5, rule, on="base", allocation="uniform", blocks=(1,),
                  batches=[batch(family, seed=s) for s in range(2)])
    assert all(2 * kept == total for kept, total in found.tensors.values())
    moved = {n for n, w in delta.state().items() if not torch.equal(w, before[n])}
    assert moved == set(chosen)
    for n in chosen:  # only a criterion that changes weights moves what stays
        m = delta.masks[n]
        assert torch.equal(delta.state()[n][m], before[n][m]) is not rule.changes
    assert delta.model.training
    assert all(p.grad is None for p in delta.model.parameters())
    assert delta.info["sparsity"][-1]["criterion"] == criterion_config(rule)
    assert bool(torch.isfinite(output(delta.model, batch(family, labels=family == "gpt2"))).all())


@pytest.mark.parametrize("rule", ALL, ids=name)
def test_what_is_dead_stays_so(rule):
    delta = attach(tiny("bert"), Full())
    data = [batch("bert", seed=s) for s in range(2)]
    prune(delta, 0.3, "random", on="base", allocation="uniform", blocks=(0,))
    first = dict(delta.masks)
    prune(delta, 0.6, rule, on="base", allocation="uniform", blocks=(0,), batches=data)
    for n, m in delta.masks.items():
        assert not (m & ~first[n]).any()
        assert int((~m).sum()) == int(0.6 * m.numel())
        assert not delta.state()[n][~m].any()


@pytest.mark.parametrize("rule", [r for r in ALL if not isinstance(r, Wanda | SparseGPT)], ids=name)
def test_on_a_delta(rule):
    delta = randomize(attach(tiny("gpt2"), LoRA(rank=4)))
    found = prune(delta, 0.5, rule, batches=[batch("gpt2")])
    assert found.kept == found.total / 2


@pytest.mark.parametrize("rule", [Taylor(), Fisher(), SNIP(), GraSP()], ids=name)
def test_on_gates(rule):
    delta = attach(tiny("vit"), Gates())
    found = prune(delta, 0.25, rule, on="gates", batches=[batch("vit")])
    assert found.total == 2 * (4 + 64)


def test_gates_are_no_chain():
    with pytest.raises(MethodError, match="no chain"):
        prune(attach(tiny("bert"), Gates()), 0.25, SynFlow(), on="gates")


def test_every_criterion_is_known():
    assert {type(r) for r in ALL} | {Movement} <= set(criteria().values())


def test_an_input_of_padding_alone_changes_nothing_of_wanda():
    """Padding that another tokenizer would have added."""
    plain = batch("bert", size=2)
    longer = {k: torch.cat([v, v.new_zeros(2, 5)], 1) if v.dim() == 2 else v for k, v in plain.items()}
    scores = []
    for data in (plain, longer):
        delta = attach(tiny("bert"), Pfeiffer(bottleneck=2))
        scores.append(Wanda().score(View(delta, targets(delta, "base"), [data])))
    for n, s in scores[0].items():
        torch.testing.assert_close(scores[1][n], s)
