"""The side primitive: what is saved for backward, modes, the memory of an encoder, and T5's relative positions."""
import copy

import pytest
import torch

import slimtune as st
from slimtune.core.sideblock import buckets
from slimtune.errors import MethodError
from slimtune.testing import batch, output, randomize, tiny
from slimtune.testing.tiny import loss

LST = st.methods.LST


def saved_bytes(model, inputs):
    """Bytes that autograd keeps for backward, beside parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(model, inputs)
    total = sum(kept.values())
    value.backward()
    return total


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_nothing_of_the_backbone_is_saved(family: str):
    """Blocks below the only one kept add no saved byte; neither does a LoRA that runs in them."""
    depth = {"t5": {"num_layers": 5}, "bert": {"num_hidden_layers": 5}}[family]
    found = []
    for changes in ({}, depth):
        model = tiny(family, dropout=True, **changes).train()
        st.attach(model, st.methods.LoRA(rank=2), name="lora")
        delta = st.attach(model, LST(reduction=4, blocks=(-1,)), name="lst")
        found.append(saved_bytes(model, batch(family)))
        trained = {id(p) for p in delta.parameters()}
        assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in trained]
        assert not [n for n, p in delta.named_parameters() if p.grad is None and ".dropped." not in n]
    st.activate(model, "lora", "lst")
    found.append(saved_bytes(model, batch(family)))
    assert len(set(found)) == 1, found


def test_the_backbones_dropout_is_off_while_the_ladder_trains():
    def twice(**settings):
        model = tiny("t5", dropout=True).train()
        st.attach(model, LST(reduction=4, **settings))
        first = output(model, batch("t5"))
        assert all(m.training for m in model.modules())
        assert torch.is_grad_enabled()
        return torch.equal(first, output(model, batch("t5")))

    assert twice(dropout=0.0)
    assert not twice(dropout=0.0, backbone_eval=False)
    assert not twice(dropout=0.0, compat="official")
    assert not twice(dropout=0.1)


def test_an_error_inside_leaves_modes_as_they_were():
    model = tiny("gpt2", dropout=True).train()
    st.attach(model, LST(reduction=4))
    with pytest.raises(MethodError, match="use_cache=False"):
        model.generate(batch("gpt2")["input_ids"][:, :5], max_new_tokens=3, use_cache=True)
    assert torch.is_grad_enabled()
    assert all(m.training for m in model.modules())
    loss(model, batch("gpt2")).backward()


@pytest.mark.parametrize("then", ["train", "eval"])
def test_an_interrupt_inside_is_made_good_by_the_next_forward(then: str):
    """torch runs no hook behind a KeyboardInterrupt."""
    def interrupt(*_):
        raise KeyboardInterrupt

    model = tiny("bert", dropout=True).train()
    st.attach(model, LST(reduction=4))
    handle = model.bert.encoder.layer[1].register_forward_pre_hook(interrupt)
    with torch.enable_grad():
        with pytest.raises(KeyboardInterrupt):
            output(model, batch("bert"))
        handle.remove()
        if then == "train":
            loss(model, batch("bert")).backward()
            assert all(m.training for m in model.modules())
        else:
            model.eval()
            assert torch.equal(output(model, batch("bert")), output(model, batch("bert")))
            assert not any(m.training for m in model.modules())


def test_memory_of_another_input_is_refused():
    model = tiny("t5")
    before = model.encoder(input_ids=batch("t5")["input_ids"])
    st.attach(model, LST(reduction=4))
    with pytest.raises(MethodError, match="did not run on this input"):
        model(encoder_outputs=before, decoder_input_ids=torch.zeros(3, 2, dtype=torch.long))
    with torch.no_grad():
        output(model, batch("t5", tokens=9))  # leaves a memory of nine tokens, as generation needs
    with pytest.raises(MethodError, match="did not run on this input"):
        model(encoder_outputs=before, decoder_input_ids=torch.zeros(3, 2, dtype=torch.long))


def test_generation_repeats_the_memory_for_beams():
    model = tiny("t5")
    randomize(st.attach(model, LST(reduction=4)))
    ids = batch("t5")["input_ids"]
    settings = {"max_new_tokens": 3, "use_cache": False, "num_beams": 3, "do_sample": False}
    together = model.generate(ids[:2], **settings)
    alone = torch.cat([model.generate(ids[i:i + 1], **settings) for i in (0, 1)])
    assert torch.equal(together, alone)


def test_a_model_is_copied_between_forward_and_backward():
    model = tiny("t5").train()
    st.attach(model, LST(reduction=4))
    value = loss(model, batch("t5"))
    assert loss(copy.deepcopy(model), batch("t5")).isfinite()
    value.backward()


def test_two_ladders_at_once_do_not_mix():
    model = tiny("bert")
    for seed, name in enumerate(("a", "b")):
        randomize(st.attach(model, LST(reduction=4, head="none"), name=name), seed)
    alone = output(model, batch("bert"))
    st.activate(model, "a", "b")
    assert torch.equal(output(model, batch("bert")), alone)


@pytest.mark.parametrize("both", [True, False])
def test_the_buckets_of_distances_are_t5s(both: bool):
    attention = tiny("t5").encoder.block[0].layer[0].SelfAttention
    far = torch.arange(-300, 301)
    for number, largest in ((32, 128), (16, 64), (8, 20)):
        right = attention._relative_position_bucket(far, both, number, largest)
        assert torch.equal(buckets(far, number, largest, both), right)
