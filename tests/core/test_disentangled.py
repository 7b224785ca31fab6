"""DeBERTa, whose projections run on a table of positions too: routes and per-example gradients against loops."""
import pytest
import torch
import torch.nn.functional as F
from route_toys import moved

import slimtune as st
from slimtune.core.disentangled import MAKER
from slimtune.core.examples import per_example
from slimtune.core.route import route
from slimtune.errors import MethodError
from slimtune.methods import get, names
from slimtune.testing import batch, small, tiny

OWN = ("bitfit", "full", "partial_k")
"""Methods that train the projections' own tensors, or the table: refused."""


def losses(model, inputs) -> torch.Tensor:
    return F.cross_entropy(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"],
                           reduction="none")


@pytest.mark.parametrize(("name", "shared"), [*((n, True) for n in names() if n not in OWN), ("lora", False)])
def test_every_method(name: str, shared: bool):
    model, inputs = tiny("deberta-v2", share_att_key=shared).double().eval(), batch("deberta-v2", size=4)
    try:
        deltas = [moved(model, small(get(name)), task, seed) for seed, task in enumerate("ab")]
    except st.SlimtuneError as refusal:
        pytest.skip(str(refusal))
    alone = {}
    for task in "ab":
        st.activate(model, task)
        with torch.no_grad():
            alone[task] = model(**inputs).logits
    assert not torch.allclose(alone["a"], alone["b"])
    with torch.no_grad(), route(model, list("abba")):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed, torch.stack([alone[t][i] for i, t in enumerate("abba")]), rtol=1e-9, atol=1e-10)
    assert not any(MAKER in m.__dict__ for m in model.modules())
    st.activate(model, "a")
    check_gradients(model, deltas[0], inputs)


def check_gradients(model, delta, inputs) -> None:
    with per_example(model) as grads:
        losses(model, inputs).sum().backward()
    found = grads.collect()
    assert not any(MAKER in m.__dict__ for m in model.modules())
    for row in range(len(inputs["labels"])):
        for p in delta.parameters():
            p.grad = None
        losses(model, {k: v[row:row + 1] for k, v in inputs.items()}).sum().backward()
        for name, p in delta.named_parameters():
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][row], wanted, rtol=1e-9, atol=1e-10)


def test_beside_other_methods_and_the_plain_backbone():
    model, inputs = tiny("deberta-v2").double().eval(), batch("deberta-v2", size=4)
    moved(model, get("lora")(rank=2), "a", 1)
    moved(model, get("ia3")(), "b", 2)
    tasks, alone = ["b", None, "a", "b"], []
    for row, task in enumerate(tasks):
        st.activate(model, *([task] if task else []))
        with torch.no_grad():
            alone.append(model(**inputs).logits[row])
    with torch.no_grad(), route(model, tasks):
        torch.testing.assert_close(model(**inputs).logits, torch.stack(alone), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OWN)
def test_what_is_refused(name: str):
    model, inputs = tiny("deberta-v2"), batch("deberta-v2")
    for seed, task in enumerate("ab"):
        moved(model, small(get(name)), task, seed)
    with pytest.raises(MethodError, match="that all 3 examples share"), torch.no_grad(), route(model, list("aba")):
        model(**inputs)
