"""Masks that change in a run: against a plain loop with W' = m * W, from every checkpoint, and through kill -9."""
import copy
import shutil

import pytest
import torch
from pydantic import ValidationError
from torch.func import functional_call
from train_toys import (
    EVERY,
    ROWS,
    SPEC,
    accuracy,
    attached,
    check_killed,
    check_resumes,
    collate,
    copy_run,
    rows,
    run,
    same_masks,
    sha,
)

import slimtune as st
from slimtune.errors import MethodError, RecipeError
from slimtune.privacy import PrivacySpec
from slimtune.sparsity.allocation import uniform
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.prune import prune
from slimtune.sparsity.schedule import Cubic, OneShot, cubic, rewound
from slimtune.sparsity.target import targets
from slimtune.testing import tiny
from slimtune.train import DeltaCallback, PruneSpec, TrainSpec, fit
from slimtune.train.checkpoint import checkpoints, read_checkpoint

M = st.methods
RAMP = Cubic(begin=0, end=6, until=8, every=2)
pytestmark = pytest.mark.usefixtures("quick_gc")


def gradual(schedule=RAMP, **options):
    return PruneSpec(**{"sparsity": 0.8, "on": "base", "allocation": "uniform", "schedule": schedule, **options})


def plain(criterion, schedule, steps, spec):
    """Full-batch AdamW on dense weights, the forward on m * W; masks drawn as the cubic says. Returns W, m, revived."""
    model = tiny("bert").double()
    chosen = list(targets(st.attach(tiny("bert"), M.LoRA(rank=1)), "base"))
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = [n.removeprefix("own.") for n in chosen]
    masks = {n: torch.ones_like(dense[n], dtype=torch.bool) for n in names}
    scores = {n: torch.zeros_like(dense[n]) for n in names}
    m, v = ({n: torch.zeros_like(p) for n, p in dense.items()} for _ in range(2))
    batch, revived = collate(rows()), False
    for t in range(steps):
        acting = {n: (p * masks[n] if n in masks else p).requires_grad_() for n, p in dense.items()}
        loss = functional_call(model, acting, kwargs=batch).loss
        raw = dict(zip(acting, torch.autograd.grad(loss, list(acting.values())), strict=True))
        for n in names:
            scores[n] -= 1e-2 * raw[n] * dense[n]
        rate = spec.learning_rate * (1 - t / steps if schedule == "linear" else rewound(t, steps, 0, 0, 6, 2))
        for n, g in raw.items():
            g = g * masks[n] if n in masks else g
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            decay = rate * spec.weight_decay if g.dim() > 1 else 0.0
            hat = m[n] / (1 - 0.9 ** (t + 1)) / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            dense[n] = dense[n] * (1 - decay) - rate * hat
        if t + 1 <= 8 and (t + 1) % 2 == 0:
            ranked = scores if criterion == "movement" else {n: dense[n].abs() for n in names}
            new = uniform(ranked, cubic(t + 1, 0, 6, 0.8))
            revived |= any(bool((new[n] & ~masks[n]).any()) for n in names)
            masks = new
        elif t + 1 > 8:
            for n in names:
                dense[n] = dense[n] * masks[n]
    return dense, masks, revived


@pytest.mark.parametrize(("criterion", "schedule", "accumulate"), [
    ("magnitude", "linear", 1), ("movement", "linear", 1), ("movement", "rewinding", 2), ("magnitude", "rewinding", 2)])
def test_a_run_is_the_plain_loop(tmp_path, criterion, schedule, accumulate):
    """Eleven steps over all examples: the shadow, its decay and momentum, raw gradients, re-entry, the rate."""
    spec = TrainSpec(steps=11, batch_size=ROWS // accumulate, gradient_accumulation=accumulate, learning_rate=2e-2,
                     weight_decay=0.3, warmup=0, clip=None, schedule=schedule, threads=1)
    delta = st.attach(tiny("bert").double(), M.Full())
    fit(delta, rows(), None, collate, None, spec, tmp_path, pruning=gradual(criterion=criterion))
    dense, masks, revived = plain(criterion, schedule, 11, spec)
    assert revived
    for n, mask in masks.items():
        assert torch.equal(delta.masks[f"own.{n}"], mask), n
    for n, value in delta.state().items():
        path = n.partition(".")[2]
        if "key.bias" not in n:  # its gradient is rounding, of which Adam makes whole steps
            torch.testing.assert_close(value, dense[path] * masks.get(path, 1), rtol=1e-6, atol=1e-8)


CASES = {
    "snip": (M.Pfeiffer(bottleneck=8), PruneSpec(sparsity=0.5, criterion="snip"), {}),
    "magnitude": (M.Full(), gradual(), {"schedule": "rewinding"}),
    "movement": (M.Full(), gradual(criterion={"name": "movement", "step": "adam"}), {}),
    "both": (M.LoRA(rank=4, dropout=0.1), gradual(on="base", criterion="taylor"), {}),
    "grows": (M.Pfeiffer(bottleneck=4), gradual(Cubic(begin=1, end=6, every=1, reenter=False), on="both"), {}),
    "gates": (M.Gates(), gradual(on="gates", by="weights", allocation=Budget(tokens=8)), {}),
    "hidden": (M.Gates(hidden=True), gradual(on="hidden", criterion="taylor"), {})}


@pytest.mark.parametrize("case", CASES)
def test_resume(tmp_path, case):
    method, pruning, options = CASES[case]
    spec = EVERY.model_copy(update=options)
    steps = (1, 5) if case == "magnitude" else (5,)
    delta = check_resumes(tmp_path, lambda: attached(method), spec, steps, pruning=pruning)
    assert all(not delta.state()[n][~m].any() for n, m in delta.masks.items() if n in delta.state())


def test_a_run_goes_back_to_before_its_masks(tmp_path):
    """The delta in memory is further than the checkpoint: nothing of what it was pruned to stays."""
    late = gradual(Cubic(begin=4, end=8, every=2))
    delta, result = run(tmp_path / "whole", attached(M.Full()), EVERY, pruning=late)
    info, digest = copy.deepcopy(delta.info), sha(delta)
    copy_run(tmp_path / "whole", tmp_path / "back", 1)
    _, other = run(tmp_path / "back", delta, EVERY, pruning=late)
    assert sha(delta) == digest
    assert other.history == result.history
    assert delta.info == info


def test_killed(tmp_path):
    """At operations all over a run with a save while the shadow is there, and one behind it."""
    spec = EVERY.model_copy(update={"steps": 2, "eval_every": 2, "keep": 1})
    pruning = gradual(Cubic(begin=0, end=1, until=2, every=1))

    def go():
        return run(tmp_path / "run", attached(M.Full()), spec, pruning=pruning)

    check_killed(tmp_path / "run", go)


def test_masks_stay_from_the_last_on_and_in_the_file(tmp_path):
    delta, result = run(tmp_path / "run", attached(M.Full()), EVERY, pruning=gradual())
    facts = {int(p.name[11:]): read_checkpoint(p) for p in checkpoints(tmp_path / "run")}
    assert {s for s, c in facts.items() if any("shadow" in n for n in c.delta)} == set(range(1, 8))
    bits = {s: {n: t for n, t in c.delta.items() if n.startswith("mask.")} for s, c in facts.items()}
    assert all(torch.equal(bits[8][n], bits[9][n]) for n in bits[8])
    delta.save(tmp_path / "delta")
    again = st.load(tiny("bert"), tmp_path / "delta")
    assert same_masks(again, delta)
    wanted = [round(1 - sum(m.numel() - int(s * m.numel()) for m in delta.masks.values()) / sum(
        m.numel() for m in delta.masks.values()), 6) for s in (cubic(t, 0, 6, 0.8) for t in (2, 4, 6, 8))]
    assert [line["sparsity"] for line in result.history if "sparsity" in line][:4] == pytest.approx(wanted, abs=1e-6)
    assert again.info["sparsity"][0]["denominator"] == "base"


def test_the_best_checkpoint_has_the_last_masks(tmp_path):
    spec = EVERY.model_copy(update={"best": "loss", "eval_every": 1})
    delta, result = run(tmp_path / "run", attached(M.Full()), spec, pruning=gradual(Cubic(end=6, every=1)))
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    assert int(result.best.name[11:]) == min(range(6, 10), key=lambda s: losses[s])
    assert delta.info["sparsity"][-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert min(losses, key=lambda s: losses[s]) < 6
    patient = spec.model_copy(update={"patience": 1})
    _, result = run(tmp_path / "two", attached(M.Full()), patient, pruning=gradual(Cubic(end=6, every=1)))
    assert result.steps == 9  # without, it would stop at 3


def test_one_shot_is_prune_and_then_fit(tmp_path):
    pruning = PruneSpec(sparsity=0.4, criterion="snip", examples=8, schedule=OneShot(rounds=2))
    delta, _ = run(tmp_path / "one", attached(M.Houlsby(bottleneck=6)), pruning=pruning)
    assert delta.info["sparsity"][0]["kept"] == 4 * 2 * 6 * 32 - int(0.4 * 4 * 2 * 6 * 32)
    assert delta.info["sparsity"][0]["rounds"] == 2
    other = attached(M.Houlsby(bottleneck=6))
    other.set_masks(delta.masks)
    run(tmp_path / "two", other)
    assert sha(other) == sha(delta)


def test_the_base_is_masked_while_lora_trains_and_comes_back(tmp_path):
    delta = attached(M.LoRA(rank=2))
    weight = delta.model.bert.encoder.layer[0].output.dense
    before = weight.weight.detach().clone()
    run(tmp_path, delta, pruning=gradual())
    mask = delta.masks["own.bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(weight.weight, before * mask)
    assert int((~mask).sum()) == int(0.8 * mask.numel())
    delta.detach()
    assert torch.equal(weight.weight, before)


def test_prune_once_for_all(tmp_path):
    """Every linear map of the encoder and the pooler ends with floor(s n) zeros, and keeps them for 50 more steps."""
    delta = attached(M.Full())
    spec = TrainSpec(**{**SPEC.model_dump(), "schedule": "rewinding", "weight_decay": 0.01})
    run(tmp_path / "one", delta, spec, pruning=gradual(Cubic(end=0.5, until=0.8), sparsity=0.85, pooler=True))
    linears = [m for m in delta.model.bert.modules() if isinstance(m, torch.nn.Linear)]
    zeros = [m.weight == 0 for m in linears]
    assert [int(z.sum()) for z in zeros] == [int(0.85 * z.numel()) for z in zeros]
    assert not (delta.model.classifier.weight == 0).any()
    fit(delta, rows(), None, collate, None, SPEC.model_copy(update={"steps": 50}), tmp_path / "two")
    assert all(torch.equal(m.weight == 0, z) for m, z in zip(linears, zeros, strict=True))


def test_masks_of_before_the_run_stay(tmp_path):
    delta = attached(M.Full())
    prune(delta, 0.5, "random", on="base", sites=("mlp.up",), seed=5)
    first = dict(delta.masks)
    pruning = gradual(criterion="random", sites=("mlp.up", "mlp.down"))
    run(tmp_path / "whole", delta, EVERY, pruning=pruning)
    assert all((delta.masks[n] <= m).all() for n, m in first.items())
    copy_run(tmp_path / "whole", tmp_path / "again", 3)
    again, _ = run(tmp_path / "again", attached(M.Full()), EVERY, pruning=pruning)  # the checkpoint tells
    assert same_masks(again, delta)
    assert again.info == delta.info
    assert [entry["kept"] for entry in delta.info["sparsity"]] == [2048, 4 * (2048 - 1638)]


@pytest.mark.parametrize(("method", "pruning", "options", "words"), [
    (M.LoRA(rank=2), gradual(criterion="movement"), {}, "does not train own.bert"),
    (M.LoRA(rank=2), gradual(), {"cache": True}, "train.cache"),
    (M.LoRA(rank=2), gradual(allocation="globl"), {}, "Did you mean"),
    (M.LoRA(rank=2), gradual(Cubic(end=20)), {}, "in a run of 9 steps"),
    (M.LoRA(rank=2), PruneSpec(sparsity=0.5), {"schedule": "rewinding"}, "prune.schedule=cubic"),
    (M.LoRA(rank=2), None, {"schedule": "rewinding"}, "prune.schedule=cubic"),
    (M.LoRA(rank=2), gradual(Cubic(end=8)), {"schedule": "rewinding", "warmup": 0.5}, "fill the 9"),
    (M.LoRA(rank=2), PruneSpec(), {}, "from 0 to below 1")])
def test_what_cannot_be_says_why(tmp_path, method, pruning, options, words):
    with pytest.raises((RecipeError, MethodError), match=words):
        run(tmp_path, attached(method), SPEC.model_copy(update=options), pruning=pruning)


@pytest.mark.parametrize(("options", "words"), [
    ({"criterion": "movement"}, "learns its scores"), ({"criterion": "obert", "schedule": "cubic"}, "reenter"),
    ({"granularity": "2:4", "schedule": "cubic"}, "give sparsity"), ({"criterion": "magnitud"}, "Did you mean")])
def test_specs_that_cannot_be(options, words):
    with pytest.raises(ValidationError, match=words):
        PruneSpec(**({"sparsity": 0.5} if "granularity" not in options else {}), **options)


def test_a_spec_is_plain_data_and_another_is_refused(tmp_path):
    spec = gradual(criterion="movement", granularity="row")
    assert PruneSpec(**spec.model_dump(mode="json")) == spec
    spec = gradual(criterion="taylor", allocation=Budget(), schedule="cubic")
    assert PruneSpec.model_validate_json(spec.model_dump_json()) == spec
    run(tmp_path, attached(M.Full()), EVERY, pruning=gradual())
    shutil.rmtree(tmp_path / "checkpoint-9")
    with pytest.raises(RecipeError, match=r"prune: this run was begun with another \(sparsity\)"):
        run(tmp_path, attached(M.Full()), EVERY, pruning=gradual(sparsity=0.7))
    with pytest.raises(RecipeError, match="prune: this run was begun with another"):
        run(tmp_path, attached(M.Full()), EVERY)


def test_a_private_run_prunes_without_its_data(tmp_path):
    private = PrivacySpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", batch_size=6)
    spec = TrainSpec(steps=3, batch_size=8)
    options = {"privacy": private, "pruning": PruneSpec(sparsity=0.5)}
    delta = attached(M.Pfeiffer(bottleneck=8))
    fit(delta, rows(), None, collate, accuracy, spec, tmp_path / "one", **options)
    assert delta.info["sparsity"][0]["sparsity"] == 0.5
    assert all(not delta.state()[n][~m].any() for n, m in delta.masks.items())
    for pruning in (PruneSpec(sparsity=0.5, criterion="snip"), gradual(on="delta")):
        with pytest.raises(RecipeError, match="private run prunes once"):
            fit(attached(), rows(), None, collate, accuracy, spec, tmp_path / "two", privacy=private, pruning=pruning)


def test_a_trainer_of_the_users_keeps_zeros(tmp_path):
    from test_delta_trainer import arguments
    from transformers import Trainer

    delta = attached(M.Full())
    prune(delta, 0.5, on="base")
    Trainer(model=delta.model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=rows(), data_collator=collate,
            callbacks=[DeltaCallback(delta)]).train()
    assert all(not delta.state()[n][~m].any() for n, m in delta.masks.items())
