"""Replay against the plain forward: the same loss and the same gradients, while no frozen block runs."""
from threading import Thread

import pytest
import torch

import slimtune as st
from slimtune.core.cut import cut
from slimtune.core.modes import evaluating
from slimtune.core.replay import Replay, states
from slimtune.errors import DeltaError, MethodError
from slimtune.testing import batch, doubled, loss, randomize, tiny

M = st.methods
LAST = M.LoRA(rank=2, blocks=(-1,))
BOTH = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
CASES = [
    ("bert", M.LinearProbe(), ["encoder.1"]), ("bert", M.LST(reduction=4), ["encoder.0", "encoder.1"]),
    ("bert", M.PartialK(), ["encoder.0"]), ("bert", LAST, ["encoder.0"]),
    ("bert", M.LST(reduction=4, blocks=(0,)), ["encoder.0"]), ("bert", M.LST(reduction=4, blocks=(1,)), ["encoder.1"]),
    ("bert", M.SideTuning(reduction=4, depth=1), ["encoder.1"]),
    ("bert", M.PrefixTuning(length=2, blocks=(-1,)), ["encoder.0"]),
    ("t5", M.LST(reduction=4), BOTH), ("bart", M.LST(reduction=4), BOTH),
    # the decoder's last block reads the encoder's end; of an encoder that trains, the decoder's blocks all do
    ("t5", M.PartialK(towers=("decoder",)), ["encoder.1", "decoder.0"]),
    ("bart", M.PartialK(towers=("decoder",)), ["encoder.1", "decoder.0"]),
    ("t5", M.PartialK(towers=("encoder",)), ["encoder.0"]), ("t5", M.PartialK(), ["encoder.0"]),
    ("clip", M.LST(reduction=4), ["text.0", "text.1", "vision.0", "vision.1"]),
    ("clip", M.PartialK(), ["text.0", "vision.0"]), ("clip", M.PartialK(towers=("vision",)), ["text.1", "vision.0"]),
    ("vit", M.PartialK(), ["vision.0"]), ("swin", M.PartialK(), ["vision.1"]), ("mpnet", M.PartialK(), ["encoder.0"]),
    ("deberta-v2", M.PartialK(), ["encoder.0"]), ("gpt2", M.PartialK(), ["decoder.0"]), ("llama", LAST, ["decoder.0"]),
]


def case(family, method, **changes):
    model = tiny(family, **changes).double()
    inputs = doubled(batch(family))
    if family == "clip":
        inputs["return_loss"] = True
    return model, inputs, randomize(st.attach(model, method))


def gradients(delta, inputs):
    for p in delta.parameters():
        p.grad = None
    value = loss(delta.model, {k: v for k, v in inputs.items() if k != "return_loss"})
    value.backward()
    return [value.detach(), *(p.grad for p in delta.parameters())]


@pytest.mark.parametrize(("family", "method", "names"), CASES)
def test_loss_and_gradients_are_those_of_the_plain_forward(family, method, names):
    model, inputs, delta = case(family, method)
    found = cut(delta, inputs)
    assert list(found.taps) == names
    kept, ran, wanted = states(delta, found, inputs), [], gradients(delta, inputs)
    own = {id(m): set(vars(m)) for m in model.modules()}
    for stub in found.stubs:  # what stands inside a block runs when the block does
        inner = next(m for n, m in model.get_submodule(stub.path).named_modules() if n.endswith(("norm", "dense", "1")))
        inner.register_forward_hook(lambda m, a, y, path=stub.path: ran.append(path))
    with Replay(model, found.stubs, found.quiet)(lambda name, h: kept[name].clone()):
        given = gradients(delta, inputs)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert set(ran) == {stub.path for stub in found.stubs if stub.runs}
    assert all(set(vars(m)) == own[id(m)] for m in model.modules())


def test_an_input_that_is_told_to_require_a_gradient_is_frozen_all_the_same():
    """As gradient checkpointing asks for it."""
    model, inputs, delta = case("bert", M.PartialK())
    wanted = cut(delta, inputs)
    model.enable_input_require_grads()
    assert cut(delta, inputs) == wanted


def test_a_state_is_what_the_block_gives():
    model, inputs, delta = case("bert", M.LST(reduction=4))
    seen = []
    model.bert.encoder.layer[0].register_forward_hook(lambda m, a, y: seen.append(y))
    found = states(delta, cut(delta, inputs), inputs)
    torch.testing.assert_close(found["encoder.0"], seen[-1])


@pytest.mark.parametrize("method", [M.LST(reduction=4, dropout=0.3), M.PartialK()])
def test_the_frozen_part_is_without_dropout_and_the_rest_has_its_own(method):
    """Beside a plain forward in train mode whose frozen modules are in eval mode, with the same random numbers."""
    model, inputs, delta = case("bert", method, dropout=True)
    found = cut(delta, inputs)
    kept = states(delta, found, inputs)
    model.train()
    frozen = [model.bert.embeddings, *(model.get_submodule(s.path) for s in found.stubs)]
    modes = {m: m.training for m in model.modules()}
    with Replay(model, found.stubs, found.quiet)(lambda name, h: kept[name]):
        torch.manual_seed(3)
        given = gradients(delta, inputs)
        again = gradients(delta, inputs)
    assert {m: m.training for m in model.modules()} == modes
    for part in frozen:
        for path, module in part.named_modules():
            module.training = "slimtune" in path
    torch.manual_seed(3)
    for a, b in zip(given, gradients(delta, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(given[0], again[0])


def test_a_tower_skips_no_block_and_draws_no_dropout_of_its_own():
    """BART's towers hold both, beside their modules; what is left is the decoder's last block."""
    model, inputs, delta = case("bart", M.PartialK(towers=("decoder",)), dropout=True, decoder_layerdrop=0.99,
                                encoder_layerdrop=0.99)
    found, wanted = cut(delta, inputs), gradients(delta, inputs)
    kept = states(delta, found, inputs)
    model.train()
    model.model.decoder.layers[1].eval()
    with Replay(model, found.stubs, found.quiet)(lambda name, h: kept[name]):
        given = gradients(delta, inputs)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_stays_after_an_error_and_other_threads_see_the_blocks():
    model, inputs, delta = case("bert", M.LinearProbe())
    found, block, wanted, seen = cut(delta, inputs), model.bert.encoder.layer[0], loss(model, inputs), []
    model.train()
    block.forward = block.forward  # as accelerate may have set one
    before = block.forward

    def other():
        with evaluating(model):
            seen.append(loss(model, inputs))

    def feed(name, h):
        thread = Thread(target=other)
        thread.start()
        thread.join()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"), Replay(model, found.stubs, found.quiet)(feed):
        model(**inputs)
    torch.testing.assert_close(seen[0], wanted)
    assert vars(block)["forward"] is before
    assert "forward" not in vars(model.bert.encoder.layer[1])
    assert all(m.training for m in model.modules())
    assert not model._forward_pre_hooks


def test_refused():
    with pytest.raises(MethodError, match="LoRA trains below or inside the first block"):
        cut(st.attach(tiny("bert"), M.LoRA(rank=2)), batch("bert"))
    with pytest.raises(MethodError, match="PromptTuning trains below"):
        cut(st.attach(tiny("bert"), M.PromptTuning(length=2)), batch("bert"))
    shared = tiny("bert")
    shared.bert.encoder.layer[1] = shared.bert.encoder.layer[0]
    with pytest.raises(MethodError, match="no hidden state stays the same"):
        cut(st.attach(shared, M.LinearProbe()), batch("bert"))
    delta = st.attach(tiny("bert"), M.LinearProbe(), name="a")
    st.attach(delta.model, LAST, name="b")
    st.activate(delta.model, "a", "b")
    with pytest.raises(DeltaError, match="'a' does not run alone: active are a b"):
        cut(delta, batch("bert"))
