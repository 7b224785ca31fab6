"""Soft movement in a run: against a plain loop with [sigma(S) > tau(t)], from a checkpoint, through kill -9."""

import pytest
import torch
from pydantic import ValidationError
from torch.func import functional_call
from train_toys import EVERY, ROWS, SPEC, attached, check_killed, check_resumes, collate, rows, run

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.movement import Movement
from slimtune.sparsity.prune import prune
from slimtune.sparsity.schedule import Cubic, cubic
from slimtune.sparsity.target import targets
from slimtune.sparsity.threshold import Threshold
from slimtune.testing import tiny
from slimtune.train import PruneSpec, TrainSpec, fit

M = st.methods
RATE, STRENGTH, TAU = 1000.0, 2.0, 0.4
pytestmark = pytest.mark.usefixtures("quick_gc")


def soft(schedule=None, tau=TAU, **settings):
    return PruneSpec(on="base", criterion={"name": "movement", "rate": RATE, "strength": STRENGTH, **settings},
                     allocation={"tau": tau}, schedule=schedule or Cubic(begin=1, end=6, until=9, every=1))


def drawn(score, tau, least=0.005):
    """[sigma(S) > tau], one number at a time, and the largest int(least n) in any case."""
    flat = score.flatten().tolist()
    keep = [1 / (1 + torch.tensor(-s, dtype=torch.double).exp().item()) > tau for s in flat]
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:int(least * len(flat))]
    return torch.tensor([k or i in best for i, k in enumerate(keep)]).view_as(score)


def plain(steps, spec):
    """AdamW on dense W, a forward on m * W; S by its gradient and that of lambda(t) times the penalty, by autograd."""
    model = tiny("bert").double()
    chosen = targets(st.attach(tiny("bert"), M.LoRA(rank=1)), "base")
    names = {n.removeprefix("own."): t.sites[0].role.startswith("attn.") for n, t in chosen.items()}
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = {n: torch.ones_like(dense[n], dtype=torch.bool) for n in names}
    scores = {n: torch.zeros_like(dense[n]) for n in names}
    m, v = ({n: torch.zeros_like(p) for n, p in dense.items()} for _ in range(2))
    batch, shares = collate(rows()), []
    for t in range(steps):
        acting = {n: (p * masks[n] if n in masks else p).requires_grad_() for n, p in dense.items()}
        loss = functional_call(model, acting, kwargs=batch).loss
        raw = dict(zip(acting, torch.autograd.grad(loss, list(acting.values())), strict=True))
        leaves = {n: s.clone().requires_grad_() for n, s in scores.items()}
        penalty = sum(torch.stack([s.sigmoid().mean() for n, s in leaves.items() if names[n] is kind]).mean()
                      for kind in (True, False))
        strength = STRENGTH * cubic(t, 1, 6, TAU) / TAU
        extra = torch.autograd.grad(strength * penalty, list(leaves.values()))
        for n, g in zip(names, extra, strict=True):
            scores[n] = scores[n] - RATE * (raw[n] * dense[n] + g)
        rate = spec.learning_rate * (1 - t / steps)
        for n, g in raw.items():
            g = g * masks[n] if n in masks else g
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            decay = rate * spec.weight_decay if g.dim() > 1 else 0.0
            hat = m[n] / (1 - 0.9 ** (t + 1)) / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            dense[n] = dense[n] * (1 - decay) - rate * hat
        if 1 < t + 1 <= 9:
            new = {n: drawn(s, cubic(t + 1, 1, 6, TAU)) for n, s in scores.items()}
            shares.append(any(bool((new[n] & ~masks[n]).any()) for n in names))
            masks = new
        elif t + 1 > 9:
            dense = {n: p * masks[n] if n in masks else p for n, p in dense.items()}
    return dense, masks, any(shares)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_plain_loop(tmp_path, accumulate):
    spec = TrainSpec(steps=11, batch_size=ROWS // accumulate, gradient_accumulation=accumulate, learning_rate=2e-2,
                     weight_decay=0.3, warmup=0, clip=None, threads=1)
    delta = st.attach(tiny("bert").double(), M.Full())
    fit(delta, rows(), None, collate, None, spec, tmp_path, pruning=soft())
    dense, masks, revived = plain(11, spec)
    assert revived
    shares = {n: float(mask.float().mean()) for n, mask in masks.items()}
    assert 0.5 < min(shares.values()) < 0.6 < 0.7 < max(shares.values()) <= 1  # each matrix finds its own
    for n, mask in masks.items():
        assert torch.equal(delta.masks[f"own.{n}"], mask), n
    for n, value in delta.state().items():
        path = n.partition(".")[2]
        if "key.bias" not in n:  # its gradient is rounding, of which Adam makes whole steps
            torch.testing.assert_close(value, dense[path] * masks.get(path, 1), rtol=1e-6, atol=1e-8)
    told = delta.info["sparsity"]
    assert len(told) == 1
    assert told[0]["allocation"] == {"tau": pytest.approx(TAU), "least": 0.005, "compat": "paper"}
    assert told[0]["kept"] == sum(int(mask.sum()) for mask in masks.values())


def test_before_tau_rises_a_run_is_dense(tmp_path):
    """tau = 0 and lambda = 0 until the last step: what lives then is what training without pruning gives."""
    delta, _ = run(tmp_path / "one", attached(M.Full()), SPEC.model_copy(update={"steps": 8}),
                   pruning=soft(Cubic(begin=8, end=8, every=1)))
    dense, _ = run(tmp_path / "two", attached(M.Full()), SPEC.model_copy(update={"steps": 8}))
    for n, value in delta.state().items():
        mask = delta.masks.get(n, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[mask], dense.state()[n][mask])
    assert delta.masks


def test_the_least_lives(tmp_path):
    """However hard the penalty presses, int(0.5 %) of each matrix stays."""
    pressed = soft(tau=0.9, strength=1e6)
    delta, _ = run(tmp_path, attached(M.Full()), EVERY, pruning=pressed)
    assert {int(m.sum()) for m in delta.masks.values()} == {int(0.005 * 1024), int(0.005 * 2048)}


@pytest.mark.parametrize("settings", [
    {}, {"step": "adam", "rate": 0.1, "strength": 100.0}, {"rows": 4, "columns": 8, "strength": 0.1}])
def test_resume(tmp_path, settings):
    delta = check_resumes(tmp_path, lambda: attached(M.Full()), EVERY, (1, 5), pruning=soft(**settings))
    assert 0.02 < delta.info["sparsity"][-1]["sparsity"] < 0.99


def test_killed(tmp_path):
    spec = EVERY.model_copy(update={"steps": 3, "eval_every": 3, "keep": 1})
    pruning = soft(Cubic(begin=0, end=2, until=3, every=1))

    def go():
        return run(tmp_path / "run", attached(M.Full()), spec, pruning=pruning)

    check_killed(tmp_path / "run", go)


def test_a_spec_is_plain_data():
    spec = soft()
    assert isinstance(spec.allocation, Threshold)
    assert PruneSpec(**spec.model_dump(mode="json")) == spec
    assert PruneSpec.model_validate_json(spec.model_dump_json()) == spec
    assert PruneSpec(sparsity=0.5, allocation={"tokens": 8}).allocation == Budget(tokens=8)


@pytest.mark.parametrize(("change", "words"), [
    ({"schedule": "one_shot"}, "learns its scores"), ({"allocation": {"tau": 0.0}}, "greater than 0"),
    ({"allocation": {"tau": 0.1, "lest": 0.1}}, "lest"), ({"allocation": {"least": 0.1}}, "tau"),
    ({"criterion": "taylor", "schedule": "one_shot"}, "rises while the scores are learned"),
    ({"allocation": {"tau": 0.1, "unit": "macs"}}, "unit")])
def test_specs_that_cannot_be(change, words):
    given = {"criterion": "movement", "schedule": "cubic", "allocation": {"tau": 0.1}, **change}
    with pytest.raises(ValidationError, match=words):
        PruneSpec(**given)


@pytest.mark.parametrize(("change", "words"), [
    ({"criterion": "taylor"}, "Taylor are no such S"), ({"sparsity": 0.5}, "decides its own sparsity"),
    ({"granularity": "2:4"}, "decides its own sparsity")])
def test_what_cannot_be_says_why(tmp_path, change, words):
    given = {"criterion": "movement", "schedule": "cubic", "allocation": {"tau": 0.1}, "on": "base", **change}
    with pytest.raises(MethodError, match=words):
        run(tmp_path, attached(M.Full()), EVERY, pruning=PruneSpec(**given))


def test_prune_itself_takes_a_threshold():
    delta = attached(M.Full())
    seen, rule = {}, Movement()
    chosen = targets(delta, "base")
    draw = torch.Generator().manual_seed(0)
    seen["movement"] = {n: torch.randn(t.parameter.shape, generator=draw) for n, t in chosen.items()}
    found = prune(delta, None, rule, on="base", allocation=Threshold(tau=0.3), notes=seen)
    assert all(torch.equal(delta.masks[n], drawn(seen["movement"][n], 0.3)) for n in chosen)
    assert found.denominator == "base"
