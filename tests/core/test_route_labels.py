"""Tasks with other numbers of labels than the model: each row as the model of its own labels gives it, the loss too."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForTokenClassification

import slimtune as st
from slimtune.core import attach
from slimtune.core.insert import CHILD
from slimtune.core.route import route
from slimtune.errors import DeltaError
from slimtune.methods import get
from slimtune.testing import batch, doubled, tiny

LABELS = {"one": 1, "two": 2, "three": 3, "five": 5}
TASKS = ["five", "one", "two", "three", "two", None]


def model_of(family: str, labels: int):
    """A tiny model with this head, on the backbone that all of them have."""
    made, base = tiny(family, num_labels=labels), tiny(family)
    prefix = base.base_model_prefix
    getattr(made, prefix).load_state_dict(getattr(base, prefix).state_dict())
    return made.double()


def tagger(labels: int):
    base = tiny("bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = BertForTokenClassification(type(base.config)(**base.config.to_dict() | {
            "num_labels": labels, "id2label": None, "label2id": None}))
    made.bert.load_state_dict(base.bert.state_dict(), strict=False)
    return made.double().eval()


def files(home: Path, make, method=None) -> dict[str, Path]:
    """A delta of every task, trained elsewhere, on a model of its own labels."""
    for seed, (name, labels) in enumerate(LABELS.items()):
        delta = attach(make(labels), method or get("lora")(rank=2), name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        delta.save(home / name)
    return {name: home / name for name in LABELS}


def alone(make, path: Path | None, labels: int):
    model = make(labels)
    if path is not None:
        st.load(model, path)
    return model


def inputs_of(family: str) -> dict:
    made = batch(family, size=len(TASKS), labels=False)
    return doubled(made)


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "tagger"])
def test_logits_losses_and_gradients_are_those_of_each_tasks_own_model(family: str, tmp_path: Path):
    make = tagger if family == "tagger" else lambda labels: model_of(family, labels)
    inputs, saved = inputs_of("bert" if family == "tagger" else family), files(tmp_path, make)
    model = make(3)
    deltas = {name: st.load(model, path, labels="own") for name, path in saved.items()}
    shape = (len(TASKS), 7) if family == "tagger" else (len(TASKS),)
    labels = torch.arange(torch.Size(shape).numel()).reshape(shape) % torch.tensor(
        [LABELS.get(t, 3) for t in TASKS]).view(-1, *[1] * (len(shape) - 1))
    with route(model, TASKS) as run:
        logits = model(**inputs).logits
        losses = run.losses(logits, labels)
    losses.sum().backward()
    assert logits.shape == (*shape, 5)
    for row, task in enumerate(TASKS):
        kinds = LABELS.get(task, 3)
        one = alone(make, saved.get(task), kinds)
        own = one(**{k: v[row:row + 1] for k, v in inputs.items()}).logits
        torch.testing.assert_close(logits[row:row + 1, ..., :kinds], own, rtol=1e-9, atol=1e-10)
        assert (logits[row, ..., kinds:] == torch.finfo(logits.dtype).min).all()
        flat, right = own.flatten(0, -2), labels[row].reshape(-1)
        wanted = F.cross_entropy(flat, right) if kinds > 1 else F.mse_loss(flat[:, 0], right.double())
        torch.testing.assert_close(losses[row], wanted, rtol=1e-9, atol=1e-10)
    check_gradients(make, saved, inputs, labels, deltas)


def check_gradients(make, saved, inputs, labels, deltas) -> None:
    rows = [i for i, t in enumerate(TASKS) if t == "two"]
    one = make(2)
    delta = st.load(one, saved["two"])
    logits = one(**{k: v[rows] for k, v in inputs.items()}).logits
    each = F.cross_entropy(logits.movedim(-1, 1), labels[rows], reduction="none")
    each.reshape(len(rows), -1).mean(1).sum().backward()
    routed = dict(deltas["two"].named_parameters())
    for name, p in delta.named_parameters():
        torch.testing.assert_close(routed[name].grad, p.grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_only_labels_that_are_scored_count(tmp_path: Path):
    saved, inputs = files(tmp_path, tagger), inputs_of("bert")
    model = tagger(3)
    for path in saved.values():
        st.load(model, path, labels="own")
    labels = torch.ones(len(TASKS), 7, dtype=torch.long).masked_fill(torch.arange(7) > 2, -100)
    tasks = ["two", "three", "five"] * 2
    with torch.no_grad(), route(model, tasks) as run:
        logits = model(**inputs).logits
        losses = run.losses(logits, labels)
    for row in range(len(tasks)):
        torch.testing.assert_close(losses[row], F.cross_entropy(logits[row, :3], labels[row, :3]))


def test_alone_and_after_detach(tmp_path: Path):
    make = lambda labels: model_of("bert", labels)  # noqa: E731
    saved, inputs = files(tmp_path, make), inputs_of("bert")
    model = make(3)
    before = model(**inputs).logits
    delta = st.load(model, saved["five"], labels="own")
    assert delta.count().head == 5 * 33
    torch.testing.assert_close(model(**inputs).logits, alone(make, saved["five"], 5)(**inputs).logits)
    with pytest.raises(DeltaError, match="another number of labels than the model"):
        model(**inputs, labels=torch.zeros(len(TASKS), dtype=torch.long))
    delta.save(tmp_path / "again")
    assert torch.equal(st.load(model, tmp_path / "again", name="again", labels="own").state()["head.classifier.weight"],
                       delta.state()["head.classifier.weight"])
    for d in list(st.deltas(model).values()):
        d.detach()
    assert CHILD not in model._modules
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(**inputs).logits, before)


def test_an_average_of_heads_that_correspond(tmp_path: Path):
    make = lambda labels: model_of("bert", labels)  # noqa: E731
    saved, inputs = files(tmp_path, make), inputs_of("bert")
    model = make(3)
    first = st.load(model, saved["five"], name="a", labels="own")
    other = st.load(model, saved["five"], name="b", labels="own")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    both = st.average(model, {"a": 0.5, "b": 0.5}, name="both").state()
    key = "head.classifier.weight"
    torch.testing.assert_close(both[key], 0.5 * (first.state()[key] + other.state()[key]))
    assert model(**inputs).logits.shape == (len(TASKS), 5)


def test_refusals(tmp_path: Path):
    make = lambda labels: model_of("bert", labels)  # noqa: E731
    saved, inputs = files(tmp_path, make), inputs_of("bert")
    model = make(3)
    with pytest.raises(DeltaError, match="labels='own'"):
        st.load(model, saved["two"])
    for name in ("two", "five", "three"):
        st.load(model, saved[name], labels="own")
    zeros = torch.zeros(len(TASKS), dtype=torch.long)
    with route(model, ["two", "five"] * 3) as run:
        with pytest.raises(DeltaError, match=r"run\.losses"):
            model(**inputs, labels=zeros)
        logits = model(**inputs).logits
        with pytest.raises(DeltaError, match="example 4 has a label that its task, of 2 labels"):
            run.losses(logits, torch.tensor([1, 4, 0, 4, 2, 4]))
        with pytest.raises(DeltaError, match="6 tasks"):
            run.losses(logits[:2], zeros)
    with pytest.raises(DeltaError, match="have other labels"):
        st.average(model, {"two": 0.5, "five": 0.5}, name="both")
    with route(model, ["three", None] * 3) as run:  # the model's own number of labels
        out = model(**inputs, labels=zeros)
        torch.testing.assert_close(run.losses(out.logits, zeros).mean(), out.loss)
    state = dict(attach(make(3), get("lora")(rank=2)).state())
    state["head.classifier.bias"] = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(DeltaError, match="the weight and the bias of a head"):
        attach(make(3), get("lora")(rank=2), state=state, labels="own")
