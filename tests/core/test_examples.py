"""per_example against a loop: one backward pass over a batch gives what one pass for each example gives."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.core import attach
from slimtune.core.examples import per_example
from slimtune.core.route import route
from slimtune.errors import DeltaError, MethodError
from slimtune.methods import get, names
from slimtune.testing import batch, doubled, small, tiny

FAMILIES = ("bert", "gpt2", "t5", "llama", "vit")


def losses(model, inputs) -> torch.Tensor:
    """One loss an example: of classes, or the mean over its own tokens."""
    logits, labels = model(**inputs).logits, inputs["labels"]
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return loss.sum(1) / (labels != -100).sum(1).clamp_min(1)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return doubled(batch(family))


def moved(model, method, **values):
    """The delta with numbers that are not its start's, where gradients vanish."""
    delta = attach(model, method, **values)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return delta


def loop(model, delta, inputs) -> dict[str, torch.Tensor]:
    rows = []
    for i in range(len(inputs["labels"])):
        for p in delta.parameters():
            p.grad = None
        losses(model, {k: v[i:i + 1] for k, v in inputs.items()}).sum().backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in delta.named_parameters()})
    return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}


def equal(model, delta, inputs) -> None:
    wanted = loop(model, delta, inputs)
    before = {n: (p, p.grad) for n, p in delta.named_parameters()}
    with per_example(model) as grads:
        losses(model, inputs).sum().backward()
    found = grads.collect()
    assert set(found) == set(wanted)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert any(g.any() for g in found.values())
    after = dict(delta.named_parameters())
    assert all(after[n] is p and after[n].grad is g for n, (p, g) in before.items()), "something was left behind"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", names())
def test_every_method(name: str, family: str):
    model = tiny(family).double().eval()
    try:
        delta = moved(model, small(get(name)))
    except st.SlimtuneError as refusal:
        pytest.skip(str(refusal))
    equal(model, delta, inputs_of(family))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "full", "prefix_tuning", "ia3", "compacter"])
def test_under_gradient_checkpointing(name: str, family: str, reentrant: bool):
    model = tiny(family).double()
    for module in model.modules():          # training mode, which checkpointing needs, without its randomness
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "dropout_prob", "attn_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    delta = moved(model, small(get(name)))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    equal(model.train(), delta, inputs_of(family))


def test_a_tied_tensor_has_one_gradient():
    """GPT-2's embedding is its output map as well: both uses add up in each example's gradient."""
    model = tiny("gpt2").double().eval()
    delta = attach(model, get("full")())
    assert model.lm_head.weight is model.transformer.wte.weight
    equal(model, delta, inputs_of("gpt2"))


def test_two_deltas_at_once():
    model, inputs = tiny("bert").double().eval(), inputs_of("bert")
    for name in "ab":
        moved(model, get("lora")(rank=2), name=name)
    st.activate(model, "a", "b")
    with per_example(model) as grads:
        losses(model, inputs).sum().backward()
    assert {n.partition("/")[0] for n in grads.collect()} == {"a", "b"}


def test_nothing_is_left_after_an_error():
    model, inputs = tiny("bert").double().eval(), inputs_of("bert")
    delta = moved(model, [get("lora")(rank=2), get("bitfit")()])
    own = {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="batch_size"), per_example(model):
        model(**inputs | {"labels": inputs["labels"][:1]})
    assert {id(p) for p in model.parameters()} == own
    assert not any("forward" in m.__dict__ for m in model.modules())
    equal(model, delta, inputs)


def test_a_forward_of_the_users_comes_back():
    """accelerate puts its own on modules, and so may anybody: behind a route as well."""
    model, inputs = tiny("bert"), batch("bert")
    attach(model, get("lora")(rank=2))
    plain = model.classifier.forward
    own = model.classifier.forward = lambda x: plain(x)
    with per_example(model):
        model(**inputs)
        assert vars(model.classifier)["forward"] is not own
    assert vars(model.classifier)["forward"] is own
    with torch.no_grad(), route(model, ["default"] * len(inputs["input_ids"])):
        model(input_ids=inputs["input_ids"])
        assert vars(model.classifier)["forward"] is not own
    assert vars(model.classifier)["forward"] is own


def test_refusals():
    model, inputs = tiny("bert"), batch("bert")
    with pytest.raises(DeltaError, match="needs an active delta"), per_example(model):
        pass
    attach(model, get("lora")(rank=2))
    with per_example(model) as grads:
        model(**inputs)
        with pytest.raises(DeltaError, match="no gradient of an example reaches"):
            grads.collect()
        with pytest.raises(DeltaError, match="now called with 1"):
            model(**{k: v[:1] for k, v in inputs.items()})
        with pytest.raises(DeltaError, match="open on this model already"), per_example(model):
            pass
    shared = tiny("deberta-v2")                 # its keys are made of positions too, once for all examples
    attach(shared, get("full")())
    with pytest.raises(MethodError, match="that all 3 examples share"), per_example(shared):
        shared(**batch("deberta-v2"))
