"""Fisher against the diagonal of the explicit mean of outer products; on gates, the order of sum (dL/dm)^2."""
import pytest
import torch

from slimtune.core import attach
from slimtune.methods import Gates, LoRA
from slimtune.sparsity.fisher import Fisher
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.testing import batch, randomize, tiny

DATA = [batch("bert", seed=0), batch("bert", size=2, seed=1)]


def gradients(seen, parts):
    found = []
    for part in parts:
        seen.model.zero_grad()
        seen.model(**part).loss.backward()
        found.append(torch.cat([t.parameter.grad.flatten() for t in seen.targets.values()]).clone())
    return torch.stack(found)


@pytest.mark.parametrize("per", ["example", "batch"])
def test_diagonal_of_the_empirical_fisher(per):
    delta = randomize(attach(tiny("bert").double(), LoRA(rank=1, sites=("attn.q",))))
    seen = View(delta, targets(delta), DATA)
    rows = [{k: v[i:i + 1] for k, v in b.items()} for b in DATA for i in range(len(b["labels"]))]
    g = gradients(seen, rows if per == "example" else DATA)
    F = sum(torch.outer(x, x) for x in g) / len(g)
    w = torch.cat([w.flatten() for w in seen.weights.values()])
    scores = torch.cat([s.flatten() for s in Fisher(per=per).score(seen).values()])
    torch.testing.assert_close(scores, 0.5 * F.diagonal() * w**2, rtol=1e-6, atol=0)


def test_on_gates_it_is_kwons_importance():
    delta = attach(tiny("bert").double(), Gates())
    seen = View(delta, targets(delta, "gates"), DATA)
    scores = torch.cat([s.flatten() for s in Fisher(per="batch").score(seen).values()])
    torch.testing.assert_close(2 * len(DATA) * scores, gradients(seen, DATA).square().sum(0), rtol=1e-6, atol=0)
