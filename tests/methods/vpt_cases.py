"""What VPT's tests share: its output and gradients beside those of a formula in plain torch."""
import torch

import slimtune as st
from slimtune.methods.vpt import VPT
from slimtune.testing import batch, doubled, output, randomize

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def run(model, method: VPT, inputs, **changes):
    """Output and gradients of a method with random values, the values, and the model without it."""
    delta = randomize(st.attach(model, method.model_copy(update={"head": "none", **changes})), std=0.5)
    named = dict(delta.named_parameters())
    own = output(model, inputs)
    grads = torch.autograd.grad(own.square().sum(), list(named.values()))
    delta.detach()
    return own, dict(zip(named, grads, strict=True)), {n: p.detach().clone() for n, p in named.items()}


def assert_same(model, method: VPT, inputs, formula):
    """The method's output and gradients are those of `formula(model, pixel_values, values)`."""
    own, grads, values = run(model, method, inputs)
    leaves = {n: v.requires_grad_() for n, v in values.items()}
    wanted = formula(model, inputs["pixel_values"], leaves)
    torch.testing.assert_close(own, wanted, **EXACT)
    right = dict(zip(leaves, torch.autograd.grad(wanted.square().sum(), list(leaves.values())), strict=True))
    torch.testing.assert_close(grads, right, **EXACT)
    assert all(g.abs().max() > 0 for g in right.values())


def images(family: str):
    return doubled(batch(family, labels=False))


def by_block(values) -> dict:
    return {int(n.split(".")[1]): p for n, p in values.items() if n.endswith(".tokens.vpt.prompt")}


def stream(model, h, prompts, carry=True, behind=False):
    """A ViT's stream behind its last block, and where prompts stand in it. behind: they follow the patches."""
    n = 0
    for i, layer in enumerate(model.vit.layers):
        own = h[:, :h.shape[1] - n] if behind else torch.cat([h[:, :1], h[:, 1 + n:]], 1)
        if i in prompts:
            p = prompts[i].expand(len(h), -1, -1)
            h, n = torch.cat([own, p] if behind else [own[:, :1], p, own[:, 1:]], 1), p.shape[1]
        elif not carry:
            h, n = own, 0
        h = layer(h)
    return model.vit.layernorm(h), n
