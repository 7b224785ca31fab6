"""Taylor against a loop over examples; on gates it is Michel's importance of heads."""
import pytest
import torch

from slimtune.core import attach
from slimtune.methods import Gates, Pfeiffer
from slimtune.sparsity.gradients import singles
from slimtune.sparsity.target import targets
from slimtune.sparsity.taylor import Taylor
from slimtune.sparsity.view import View
from slimtune.testing import batch, randomize, tiny

DATA = [batch("bert", seed=0), batch("bert", size=2, seed=1)]


def rows(b):
    return [{k: v[i:i + 1] for k, v in b.items()} for i in range(len(b["labels"]))]


@pytest.mark.parametrize("per", ["example", "batch"])
def test_mean_of_sizes(per):
    delta = randomize(attach(tiny("bert").double(), Pfeiffer(bottleneck=3)))
    seen = View(delta, targets(delta), DATA)
    parts = [one for b in DATA for one in (rows(b) if per == "example" else [b])]
    total = dict.fromkeys(seen.targets, 0)
    for part in parts:
        delta.model.zero_grad()
        delta.model(**part).loss.backward()
        for name, t in seen.targets.items():
            total[name] = total[name] + (t.parameter * t.parameter.grad).abs().detach() / len(parts)
    scores = Taylor(per=per).score(seen)
    for name, slow in total.items():
        torch.testing.assert_close(scores[name], slow, rtol=1e-6, atol=0)


def test_is_michels_importance_of_heads():
    """E |A_h^T dL/dA_h|, A_h the output of head h, read where the heads enter the output projection."""
    delta = attach(tiny("bert").double(), Gates())
    scores = Taylor().score(View(delta, targets(delta, "gates"), DATA))
    delta.detach()
    model, importance, n = delta.model, [torch.zeros(4).double() for _ in range(2)], 0
    for one in (one for b in DATA for one in rows(b)):
        kept = []

        def keep(module, args, kept=kept):
            kept.append(args[0])
            args[0].requires_grad_().retain_grad()
        handles = [layer.attention.output.dense.register_forward_pre_hook(keep) for layer in model.bert.encoder.layer]
        model(**one).loss.backward()
        for i, a in enumerate(kept):
            importance[i] += (a * a.grad).view(-1, 4, 8).sum((0, 2)).abs().detach()
        n += 1
        for handle in handles:
            handle.remove()
    for i, slow in enumerate(importance):
        torch.testing.assert_close(scores[f"encoder.{i}.attn.heads.gates.c"], slow / n, rtol=1e-6, atol=0)


def test_normalised_by_layer():
    delta = attach(tiny("bert").double(), Gates())
    plain, unit = (Taylor(normalize=n).score(View(delta, targets(delta, "gates"), DATA)) for n in (False, True))
    for name, s in unit.items():
        torch.testing.assert_close(s.norm(), torch.tensor(1.0).double())
        torch.testing.assert_close(s, plain[name] / plain[name].norm())


def test_singles_keep_what_has_no_examples():
    shared = torch.arange(5)
    ones = list(singles({"x": torch.arange(6).view(3, 2), "positions": shared, "use_cache": False}))
    assert [one["x"].tolist() for one in ones] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(one["positions"] is shared and one["use_cache"] is False for one in ones)
