"""VPT with a task for each example, and with each example's gradients, in every form, against one after the other."""
import pytest
import torch
import torch.nn.functional as F
from vpt_cases import images

import slimtune as st
from slimtune.methods.vpt import VPT
from slimtune.testing import randomize, tiny

FORMS = [("vit", {"path": "tokens"}), ("vit", {"deep": False}), ("vit", {"tied": True, "project": 4}),
         ("vit", {"location": "add"}), ("deit", {"location": "add-1", "deep": False}),
         ("vit", {"location": "pixel", "deep": False, "init": "imagenet"}), ("vit", {"pool": "image+prompt"}),
         ("vit", {"location": "below", "deep": False}), ("dinov2", {"location": "pad", "deep": False}), ("swin", {}),
         ("swin", {"path": "tokens"}), ("swin", {"deep": False}), ("swin", {"location": "pad", "deep": False})]
LABELS = torch.arange(3)


def losses(model, x):
    return F.cross_entropy(model(pixel_values=x).logits, LABELS[:len(x)], reduction="none")


@pytest.mark.parametrize(("family", "settings"), FORMS, ids=str)
def test_a_task_for_each_example(family: str, settings):
    model, x = tiny(family).double(), images(family)["pixel_values"]
    for seed, name in enumerate("ab"):
        randomize(st.attach(model, VPT(length=2, **settings), name=name), seed)
    alone = {}
    for name in "ab":
        st.activate(model, name)
        alone[name] = model(pixel_values=x).logits
    with st.route(model, ["a", "b", "a"]):
        mixed = model(pixel_values=x).logits
    torch.testing.assert_close(mixed, torch.stack([alone["a"][0], alone["b"][1], alone["a"][2]]), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(alone["a"], alone["b"])


@pytest.mark.parametrize(("family", "settings"), FORMS, ids=str)
@pytest.mark.parametrize("beside", [(), (st.methods.BitFit(),)], ids=["alone", "bitfit"])
def test_each_examples_gradient(family: str, settings, beside):
    model, x = tiny(family).double(), images(family)["pixel_values"]
    delta = randomize(st.attach(model, [VPT(length=2, **settings), *beside]))
    named = dict(delta.named_parameters())
    loop = []
    for i in range(3):
        loss = F.cross_entropy(model(pixel_values=x[i:i + 1]).logits, LABELS[i:i + 1])
        loop.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    with st.per_example(model) as grads:
        losses(model, x).sum().backward()
    for name, grad in grads.collect().items():
        torch.testing.assert_close(grad, torch.stack([row[name] for row in loop]), rtol=1e-9, atol=1e-10)
