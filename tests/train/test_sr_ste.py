"""SR-STE in a run: against autograd straight through 2:4 masks, from a checkpoint, through kill -9."""
import itertools

import pytest
import torch
from pydantic import ValidationError
from torch.func import functional_call
from train_toys import EVERY, ROWS, SPEC, attached, check_killed, check_resumes, collate, rows, run

import slimtune as st
from slimtune.core.bits import unpack
from slimtune.errors import MethodError, RecipeError
from slimtune.privacy import PrivacySpec
from slimtune.sparsity.prune import prune
from slimtune.sparsity.schedule import SRSTE
from slimtune.sparsity.target import targets
from slimtune.testing import tiny
from slimtune.train import PruneSpec, TrainSpec, fit
from slimtune.train.checkpoint import checkpoints, read_checkpoint

M = st.methods
pytestmark = pytest.mark.usefixtures("quick_gc")


def spec_of(schedule="sr_ste", **options):
    return PruneSpec(**{"on": "base", "granularity": "2:4", "schedule": schedule, **options})


def two_of_four(weight):
    """Of each four along the input the two largest; of equal ones the later."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(weight.shape[0]):
        for j in range(0, weight.shape[1], 4):
            best = sorted(range(4), key=lambda k: (abs(float(weight[i, j + k])), k))[2:]
            keep[i, [j + k for k in best]] = True
    return keep


def plain(strength, steps, spec, until, before):
    """AdamW on dense W; the forward on W + (m W - W) without a gradient, and lambda / 2 ||(1 - m) W||^2 beside it."""
    model = tiny("bert").double()
    names = [n.removeprefix("own.") for n in targets(st.attach(tiny("bert"), M.LoRA(rank=1)), "base")]
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, mask in before.items():
        dense[n] = dense[n] * mask
    masks = {n: two_of_four(dense[n]) & before.get(n, torch.tensor(True)) for n in names}
    m, v = ({n: torch.zeros_like(p) for n, p in dense.items()} for _ in range(2))
    batch, moved = collate(rows()), 0
    for t in range(steps):
        leaves = {n: p.clone().requires_grad_() for n, p in dense.items()}
        if t < until:
            acting = {n: w + (masks[n] * w - w).detach() if n in masks else w for n, w in leaves.items()}
            extra = sum(strength / 2 * (leaves[n] * ~masks[n]).square().sum() for n in names)
        else:
            acting, extra = {n: w * masks[n] if n in masks else w for n, w in leaves.items()}, 0.0
        loss = functional_call(model, acting, kwargs=batch).loss + extra
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = spec.learning_rate * (1 - t / steps)
        for n, g in grads.items():
            g = g * before[n] if n in before else g
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            decay = rate * spec.weight_decay if g.dim() > 1 else 0.0
            hat = m[n] / (1 - 0.9 ** (t + 1)) / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            dense[n] = dense[n] * (1 - decay) - rate * hat
        if t + 1 <= until:
            new = {n: two_of_four(dense[n]) & before.get(n, torch.tensor(True)) for n in names}
            moved += sum(int((new[n] & ~masks[n]).sum()) for n in names)
            masks = new
        if t + 1 >= until:
            dense = {n: p * masks[n] if n in masks else p for n, p in dense.items()}
    return {n: p * masks[n] if n in masks else p for n, p in dense.items()}, masks, moved


@pytest.mark.parametrize(("strength", "accumulate", "until", "masked"), [
    (2e-4, 1, 1.0, False), (0.5, 2, 6, False), (0.0, 1, 1.0, True)])
def test_a_run_is_the_plain_loop(tmp_path, strength, accumulate, until, masked):
    """Nine steps over all examples; with masks of before the run, what these hold stays dead."""
    spec = TrainSpec(steps=9, batch_size=ROWS // accumulate, gradient_accumulation=accumulate, learning_rate=2e-2,
                     weight_decay=0.3, warmup=0, clip=None, threads=1)
    delta = st.attach(tiny("bert").double(), M.Full())
    if masked:
        prune(delta, 0.3, "random", on="base", sites=("mlp.up",), seed=3)
    before = {n.removeprefix("own."): m for n, m in delta.masks.items()}
    pruning = spec_of(SRSTE(strength=strength, until=until))
    fit(delta, rows(), None, collate, None, spec, tmp_path, pruning=pruning)
    dense, masks, moved = plain(strength, 9, spec, until if isinstance(until, int) else 9, before)
    assert moved > 100
    for n, mask in masks.items():
        assert torch.equal(delta.masks[f"own.{n}"], mask), n
    for n, value in delta.state().items():
        path = n.partition(".")[2]
        if "key.bias" not in n:  # its gradient is rounding, of which Adam makes whole steps
            torch.testing.assert_close(value, dense[path], rtol=1e-6, atol=1e-8)
    if not masked:
        assert delta.info["sparsity"][-1]["sparsity"] == 0.5


def test_two_of_four_at_every_checkpoint(tmp_path):
    """Each one is sparse already, so any of them may be the best; another granularity holds its sparsity."""
    spec = EVERY.model_copy(update={"best": "loss", "eval_every": 1})
    delta, result = run(tmp_path / "nm", attached(M.Full()), spec, pruning=spec_of())
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    assert int(result.best.name[11:]) == min(losses, key=lambda s: losses[s])
    for n, mask in delta.masks.items():
        assert torch.equal(mask.view(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2))
        assert not delta.state()[n][~mask].any()
    assert {line["sparsity"] for line in result.history if "sparsity" in line} == {0.5}
    delta, _ = run(tmp_path / "row", attached(M.Full()), EVERY, pruning=spec_of(
        granularity="element", sparsity=0.75, allocation="uniform"))
    assert delta.info["sparsity"][-1]["sparsity"] == 0.75


def test_the_second_term_brings_masks_to_rest(tmp_path):
    """The paper's measure: fewer weights change sides when lambda draws the dead to 0."""
    spec = EVERY.model_copy(update={"steps": 30, "save_every": 1, "learning_rate": 3e-2, "weight_decay": 0.0})
    changes = {}
    for strength in (0.0, 1.0):
        delta, _ = run(tmp_path / f"{strength}", attached(M.Full()), spec, pruning=spec_of(SRSTE(strength=strength)))
        shapes = {f"mask.{n}": tuple(m.shape) for n, m in delta.masks.items()}
        seen = [{n: unpack(read_checkpoint(path).delta[n], shape) for n, shape in shapes.items()}
                for path in sorted(checkpoints(tmp_path / f"{strength}"), key=lambda p: int(p.name[11:]))]
        changes[strength] = sum(int((a[n] ^ b[n]).sum()) for a, b in itertools.pairwise(seen) for n in a)
    assert 0 < changes[1.0] < changes[0.0]


@pytest.mark.parametrize("method", [M.Full(), M.LoRA(rank=4)])
def test_resume(tmp_path, method):
    pruning = spec_of(SRSTE(strength=0.01), on="base" if isinstance(method, M.Full) else "delta",
                      sites=("linear",))
    check_resumes(tmp_path, lambda: attached(method), EVERY, (1, 5), pruning=pruning)


def test_killed(tmp_path):
    spec = EVERY.model_copy(update={"steps": 3, "eval_every": 3, "keep": 1})

    def go():
        return run(tmp_path / "run", attached(M.Full()), spec, pruning=spec_of(SRSTE(strength=0.01)))

    check_killed(tmp_path / "run", go)


@pytest.mark.parametrize(("options", "words"), [
    ({"granularity": "element"}, "give a granularity n:m"), ({"criterion": "movement"}, "learns its scores"),
    ({"criterion": "obert"}, "prune in one shot"), ({"allocation": {"tau": 0.1}}, "give a cubic schedule"),
    ({"schedule": {"name": "sr_ste", "strength": -1}}, "strength"), ({"schedule": "sr_st"}, "sr_ste")])
def test_specs_that_cannot_be(options, words):
    with pytest.raises(ValidationError, match=words):
        spec_of(**options)


@pytest.mark.parametrize(("method", "pruning", "options", "words"), [
    (M.LoRA(rank=4), spec_of(), {}, "does not train own.bert"),
    (M.Full(), spec_of(sparsity=0.5), {}, "2:4 decides its own sparsity"),
    (M.Full(), spec_of(SRSTE(until=20)), {}, "in a run of 9 steps"),
    (M.LoRA(rank=2), spec_of(on="delta"), {}, "does not fit"),
    (M.Full(), spec_of(), {"schedule": "rewinding"}, "prune.schedule=cubic")])
def test_what_cannot_be_says_why(tmp_path, method, pruning, options, words):
    with pytest.raises((RecipeError, MethodError), match=words):
        run(tmp_path, attached(method), SPEC.model_copy(update=options), pruning=pruning)


def test_a_private_run_may_not(tmp_path):
    private = PrivacySpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", batch_size=6)
    with pytest.raises(RecipeError, match="private run prunes once"):
        fit(attached(M.LoRA(rank=4)), rows(), None, collate, None, TrainSpec(steps=3, batch_size=8), tmp_path,
            privacy=private, pruning=spec_of(on="delta"))


def test_a_spec_is_plain_data():
    spec = spec_of(SRSTE(strength=0.01, until=5))
    assert PruneSpec(**spec.model_dump(mode="json")) == spec
    assert PruneSpec.model_validate_json(spec.model_dump_json()) == spec
