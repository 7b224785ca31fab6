"""Masks: what does not live stays 0 through training, files, switches and merges; the backbone comes back bitwise."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from slimtune.core.attach import attach
from slimtune.core.average import average
from slimtune.core.bits import living, pack, spread, unpack
from slimtune.core.load import load_delta
from slimtune.core.mask import apply_masks, hold, mask_gradients
from slimtune.core.route import route
from slimtune.core.switch import activate
from slimtune.errors import DeltaError
from slimtune.methods import Full, LoRA, PrefixTuning
from slimtune.testing.tiny import batch, loss, tiny

BASE = "own.bert.encoder.layer.0.attention.self.query.weight"
A, B = "encoder.0.attn.q.lora.A", "encoder.0.attn.q.lora.B"


def half(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def logits(model):
    with torch.no_grad():
        return model(**batch("bert")).logits


def weight(model):
    return model.bert.encoder.layer[0].attention.self.query.weight


def trained(delta, optimizer, steps=3):
    hold(delta, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(delta.model, batch("bert")).backward()
        optimizer.step()


@given(some.lists(some.booleans(), max_size=70))
def test_bits(values):
    mask = torch.tensor(values, dtype=torch.bool)
    assert torch.equal(unpack(pack(mask), tuple(mask.shape)), mask)
    assert pack(mask).numel() == -(-len(values) // 8)
    tensor = torch.randn(len(values))
    assert torch.equal(spread(living(tensor, mask), mask), torch.where(mask, tensor, torch.zeros(())))


def test_bits_behind_the_last_entry_are_refused():
    with pytest.raises(DeltaError, match="behind its last"):
        unpack(torch.tensor([255], dtype=torch.uint8), (7,))


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)])
def test_zeros_stay_through_momentum_and_decay(optimizer):
    model = tiny("bert")
    delta = attach(model, LoRA(rank=4))
    made = optimizer(list(delta.parameters()))
    trained(delta, made, 2)                      # momentum of what will not live
    masks = {A: half((4, 32)), B: half((32, 4), 1), BASE: half((32, 32), 2)}
    delta.set_masks(masks)
    before = {n: t.clone() for n, t in delta.state().items()}
    trained(delta, made)
    for name in (A, B):
        assert not delta.state()[name][~masks[name]].any()
        assert (delta.state()[name] != before[name])[masks[name]].all()
    assert torch.equal(weight(model) == 0, ~masks[BASE])


def test_the_masked_backbone_is_the_equation_and_comes_back():
    model = tiny("bert")
    plain, start = logits(model), weight(model).detach().clone()
    delta = attach(model, LoRA(rank=2))
    delta.set_masks({BASE: half((32, 32))})
    masked = logits(model)
    with delta.disabled():
        assert torch.equal(logits(model), plain)
    other = tiny("bert")
    with torch.no_grad():
        weight(other).mul_(half((32, 32)))
    assert torch.equal(masked, logits(other))
    delta.set_masks({})
    assert torch.equal(logits(model), plain)
    delta.set_masks({BASE: half((32, 32))})
    delta.detach()
    assert torch.equal(weight(model), start)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(("method", "names"), [(LoRA(rank=4), (A, BASE)), (Full(), (BASE,))])
def test_a_file_holds_bits_and_what_lives(tmp_path, method, names):
    model = tiny("bert")
    delta = attach(model, method)
    dense = delta.count().stored
    shapes = {A: (4, 32), BASE: (32, 32)}
    delta.set_masks({name: half(shapes[name], i) for i, name in enumerate(names)})
    trained(delta, torch.optim.AdamW(delta.parameters(), lr=0.01))
    delta.save(tmp_path / "delta")
    gone = sum(int((~m).sum()) for n, m in delta.masks.items() if n in delta.state())
    assert delta.count().stored == dense - gone
    again = load_delta(tiny("bert"), tmp_path / "delta")
    assert again.masks.keys() == delta.masks.keys()
    assert all(torch.equal(again.masks[n], delta.masks[n]) for n in names)
    assert all(torch.equal(t, delta.state()[n]) for n, t in again.state().items())
    assert torch.equal(logits(again.model), logits(model))


def test_merging_asks_about_zeros():
    model = tiny("bert")
    delta = attach(model, LoRA(rank=4))
    trained(delta, torch.optim.AdamW(delta.parameters(), lr=0.1))
    mask = half((32, 32))
    delta.set_masks({BASE: mask})
    before, ab = logits(model), delta.state()
    with pytest.raises(DeltaError, match="zeros='fill'"):
        delta.merge()
    delta.merge(zeros="fill")
    torch.testing.assert_close(logits(model), before)
    delta.unmerge()
    delta.merge(zeros="keep")
    update = delta.methods[0].alpha / 4 * ab[B] @ ab[A]
    torch.testing.assert_close(weight(model), (weight(tiny("bert")) + update) * mask)
    with pytest.raises(DeltaError, match="merged"):
        delta.set_masks({})
    delta.unmerge()
    assert torch.equal(logits(model), before)


def test_masks_that_fit_nothing_change_nothing():
    delta = attach(tiny("bert"), LoRA(rank=4))
    delta.set_masks({A: half((4, 32))})
    for masks, words in (({"encoder.0.attn.q.lora.C": half((4, 32))}, "Did you mean"), ({A: half((3, 32))}, "shape"),
                         ({A: torch.ones(4, 32)}, "booleans")):
        with pytest.raises(DeltaError, match=words):
            delta.set_masks({BASE: half((32, 32)), **masks})
        assert list(delta.masks) == [A]
    assert len(delta.owned) == 2                 # the head alone


def test_what_a_saved_delta_drops_cannot_be_masked(tmp_path):
    delta = attach(tiny("bert"), PrefixTuning(length=2, hidden=4))
    trained = dict(delta.named_parameters())
    name, value = next((n, t) for n, t in trained.items() if t.dim() == 2 and "prefix" in n)
    delta.set_masks({name: half(value.shape)})
    with pytest.raises(DeltaError, match="in its stead"):
        delta.save(tmp_path / "delta")


def test_a_step_costs_nothing_without_masks(monkeypatch):
    delta = attach(tiny("bert"), LoRA(rank=2))
    monkeypatch.setattr(type(delta), "tensors", None)
    mask_gradients(delta)
    apply_masks(delta)


def test_masks_keep_the_order_of_the_active():
    """Of a tensor that two own the last one's stands, also after the first has got other masks."""
    model = tiny("bert")
    first, last = attach(model, LoRA(rank=2), name="first"), attach(model, LoRA(rank=2), name="last")
    last.set_masks({BASE: half((32, 32))})
    activate(model, "first", "last")
    first.set_masks({BASE: half((32, 32), 1)})
    assert torch.equal(weight(model) == 0, ~half((32, 32)))
    first.set_masks({})
    assert torch.equal(weight(model) == 0, ~half((32, 32)))


def test_a_head_that_trains_is_not_masked_as_the_backbones():
    delta = attach(tiny("bert"), LoRA(rank=2))
    with pytest.raises(DeltaError, match=r"no tensor 'own\.classifier\.weight'"):
        delta.set_masks({"own.classifier.weight": half((3, 32))})


def test_an_open_route_keeps_its_weights(tmp_path):
    """Masks are not set then; a masked delta that is loaded meanwhile changes no answer, and cannot half come."""
    model = tiny("bert")
    attach(model, LoRA(rank=2), name="kept")
    masked = attach(tiny("bert"), LoRA(rank=2))
    masked.set_masks({BASE: half((32, 32))})
    masked.save(tmp_path / "masked")
    rows = batch("bert", labels=False)
    with torch.no_grad(), route(model, ["kept"] * len(rows["input_ids"])):
        before = model(**rows).logits
        with pytest.raises(DeltaError, match="a route is open"):
            model.slimtune.deltas["kept"].set_masks({BASE: half((32, 32))})
        loaded = load_delta(model, tmp_path / "masked", name="masked")
        assert torch.equal(model(**rows).logits, before)
    assert loaded.active
    assert torch.equal(weight(model) == 0, ~half((32, 32)))


def test_a_file_that_fits_nothing_leaves_what_was_active(tmp_path):
    model = tiny("bert")
    old = attach(model, LoRA(rank=2), name="old")
    other = attach(tiny("bert"), LoRA(rank=2))
    other.set_masks({BASE: half((32, 32))})
    other.masks["own.nowhere"] = other.masks.pop(BASE)
    other.owned[-1].path = "nowhere"
    other.save(tmp_path / "other")
    with pytest.raises(DeltaError, match=r"no tensor 'own\.nowhere'"):
        load_delta(model, tmp_path / "other", name="new")
    assert old.active
    assert list(model.slimtune.deltas) == ["old"]


def test_an_average_stands_on_the_masks_of_its_parts():
    model = tiny("bert")
    one, two = attach(model, LoRA(rank=4), name="one"), attach(model, LoRA(rank=4), name="two", seed=1)
    own = half((4, 32), 5)
    one.set_masks({BASE: half((32, 32)), A: own})
    with pytest.raises(DeltaError, match="mask the backbone otherwise"):
        average(model, {"one": 0.5, "two": 0.5}, "mix")
    two.set_masks({BASE: half((32, 32)), A: half((4, 32), 6)})
    mix = average(model, {"one": 0.5, "two": 0.5}, "mix")
    assert torch.equal(mix.masks[A], own | half((4, 32), 6))
    activate(model, "mix")
    assert torch.equal(weight(model) == 0, ~half((32, 32)))
    activate(model, "one")
    alone = logits(model)
    average(model, {"one": 1.0}, "same")
    activate(model, "same")
    assert torch.equal(logits(model), alone)
