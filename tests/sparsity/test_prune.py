"""prune end to end: counts, what is dead stays dead, what is refused, and what is written down."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.criterion import Criterion
from slimtune.sparsity.prune import prune
from slimtune.sparsity.random import Random
from slimtune.sparsity.target import targets
from slimtune.testing import batch, tiny


def zeros(delta):
    return sum(int((~m).sum()) for m in delta.masks.values())


@pytest.mark.parametrize("allocation", ["global", "uniform", "er"])
@pytest.mark.parametrize("on", ["delta", "base", "both"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_counts_are_exact(family, on, allocation):
    delta = st.attach(tiny(family), st.methods.Pfeiffer(bottleneck=4))
    found = prune(delta, 0.3, on=on, allocation=allocation)
    sizes = [m.numel() for m in delta.masks.values()]
    wanted = sum(int(0.3 * n) for n in sizes) if allocation == "uniform" else int(0.3 * sum(sizes))
    assert zeros(delta) == wanted == found.total - found.kept
    assert sum(sizes) == found.total
    state = delta.state()
    assert all(torch.equal(state[n] == 0, ~m) for n, m in delta.masks.items() if n in state)


def test_large_sparse_keeps_as_many():
    kept = [prune(st.attach(tiny("bert"), st.methods.Houlsby(bottleneck=12 * times)), 1 - 1 / times, "random").kept
            for times in (1, 2, 3, 4)]
    assert kept == [4 * 2 * 32 * 12] * 4


def test_prune_twice():
    delta = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=8))
    prune(delta, 0.4)
    first = dict(delta.masks)
    with torch.no_grad():  # the dead do not come back, whatever they would score
        scores = {n: torch.rand_like(p) for n, p in delta.tensors().items() if n in first}
        for n, s in scores.items():
            delta.tensors()[n].copy_(s * first[n])
    assert prune(delta, 0.7, "random", seed=3).total - zeros(delta) == 2 * 2 * 8 * 32 - int(0.7 * 2 * 2 * 8 * 32)
    assert all((delta.masks[n] <= first[n]).all() for n in first)
    again = prune(delta, 0.7, "random", seed=9)
    assert again.sparsity == pytest.approx(0.7, abs=1e-3)
    assert [entry["kept"] for entry in delta.info["sparsity"]] == [615, 308, 308]


class Below(Random):
    """Scores that are all below 0, so that a dead weight's 0 would be the best."""

    def score(self, view):
        return {name: s - 1 for name, s in super().score(view).items()}


@pytest.mark.parametrize("granularity", ["element", "row", "column", {"name": "block", "rows": 4, "columns": 4},
                                         "whole"])
def test_dead_units_stay_dead(granularity):
    """By a signed criterion, to less and to more."""
    delta, whole = st.attach(tiny("bert"), st.methods.LoRA(rank=2)), granularity == "whole"
    options = {"on": "base", "granularity": granularity, "allocation": "global" if whole else "uniform"}
    found = prune(delta, 0.4, Below(), seed=1, **options)
    first = dict(delta.masks)
    assert prune(delta, 0.2, Below(), seed=2, **options).kept == found.kept
    assert all(torch.equal(delta.masks[n], m) for n, m in first.items())
    prune(delta, 0.6, Below(), seed=3, **options)
    assert all((delta.masks[n] <= m).all() for n, m in first.items())
    gone = [float((~m).float().mean()) for m in delta.masks.values()]
    assert gone.count(1.0) == int(0.6 * 12) if whole else gone == pytest.approx([0.6] * 12, abs=0.04)


def test_scores_that_cannot_be_ranked_change_nothing():
    class Bad(Criterion):
        def score(self, view):
            return {name: w / 0 for name, w in view.weights.items()}

    delta = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=8))
    before = {n: t.clone() for n, t in delta.state().items()}
    with pytest.raises(MethodError, match="not finite"):
        prune(delta, 0.5, Bad())
    assert all(torch.equal(t, before[n]) for n, t in delta.state().items())
    assert not delta.masks
    assert "sparsity" not in delta.info


@pytest.mark.parametrize(("options", "words"), [
    ({"sparsity": 1.0}, "from 0 to below 1"), ({"sparsity": None}, "from 0 to below 1"),
    ({"sparsity": 0.5, "granularity": "2:4"}, "decides its own"),
    ({"sparsity": None, "granularity": "2:4", "allocation": "uniform"}, "decides its own"),
    ({"sparsity": 0.5, "by": "weights"}, "only gates"), ({"sparsity": 0.5, "allocation": Budget()}, "they are gates"),
    ({"sparsity": 0.5, "criterion": "magnitud"}, "Did you mean"), ({"sparsity": 0.5, "criterion": {"a": 1}}, "name"),
    ({"sparsity": 0.5, "criterion": {"name": "magnitude", "x": 1}}, "no such argument"),
    ({"sparsity": 0.5, "criterion": "snip"}, "data"),
    ({"sparsity": 0.5, "allocation": "row", "on": "gates"}, "no rows")])
def test_what_cannot_be_says_why(options, words):
    method = st.methods.Gates() if options.get("on") == "gates" else st.methods.Pfeiffer(bottleneck=4)
    delta = st.attach(tiny("bert"), method)
    with pytest.raises(MethodError, match=words):
        prune(delta, **options)
    assert not delta.masks


def test_it_is_written_down_and_saved(tmp_path):
    delta = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=8))
    prune(delta, 0.5, "snip", batches=[batch("bert")], allocation="uniform")
    delta.save(tmp_path / "delta")
    again = st.load(tiny("bert"), tmp_path / "delta")
    assert again.info["sparsity"] == [{
        "sparsity": 0.5, "kept": 512, "total": 1024, "denominator": "delta", "criterion": {"name": "snip"},
        "on": "delta", "by": "own", "allocation": "uniform", "granularity": {"name": "element"}}]
    assert all(torch.equal(again.masks[n], m) for n, m in delta.masks.items())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_heads_and_neurons_by_their_weights_in_a_budget(criterion):
    delta = st.attach(tiny("llama"), st.methods.Gates())
    prune(delta, 0.5, criterion, on="gates", by="weights", allocation=Budget(tokens=16), batches=[batch("llama")])
    macs = Budget(tokens=16).costs(delta, targets(delta, "gates"))
    spent = sum(int(delta.masks[n].sum()) * macs[n] for n in macs)
    whole = sum(delta.masks[n].numel() * macs[n] for n in macs)
    assert 0.45 * whole < spent <= 0.5 * whole


def test_the_model_and_its_generators_are_left_as_they_were():
    model = tiny("bert", dropout=True).train()
    delta = st.attach(model, st.methods.Pfeiffer(bottleneck=4))
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    prune(delta, 0.5, "snip", on="both", batches=[batch("bert")])
    assert torch.equal(torch.rand(1), wanted)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(own.base.requires_grad for own in delta.owned if own.group == "pruned")
    assert [p.requires_grad for p in model.bert.parameters() if p.dim() > 1].count(True) == 4  # the adapters'


def test_the_same_seed_draws_the_same_whatever_else_is_pruned():
    one = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    prune(one, 0.5, "random", on="base", allocation="uniform", sites=("mlp.up",))
    two = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    prune(two, 0.5, "random", on="both", allocation="uniform")
    assert all(torch.equal(two.masks[n], m) for n, m in one.masks.items())


@pytest.mark.parametrize("option", ["on", "ties", "rule"])
def test_an_option_that_does_not_exist_is_refused(option):
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=2))
    with pytest.raises(MethodError, match=f"no {option}='exakt'"):
        prune(delta, 0.5, **{option: "exakt"})
    assert not delta.masks
