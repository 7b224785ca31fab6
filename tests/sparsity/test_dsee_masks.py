"""DSEE's S1 against its definition: two groups, every mode, both stages, and heads and neurons that are sliced out."""
import pytest
import torch

from slimtune.core import attach, load_delta
from slimtune.core.support import sparse_matrix
from slimtune.errors import MethodError
from slimtune.methods import DSEE, Gates, LoRA
from slimtune.sparsity.dsee import SCORES, dsee_structured, dsee_unstructured
from slimtune.sparsity.macs import count_macs
from slimtune.sparsity.shrink import shrink
from slimtune.testing.tiny import batch, loss, tiny

OWN = {"support": "magnitude", "rank": 2, "nonzero": 16}
QUERY = "own.bert.encoder.layer.0.attention.self.query.weight"


def trained(model, methods, steps=3, name="bert"):
    delta = attach(model, methods)
    step_on(delta, steps, name)
    return delta


def step_on(delta, steps, name="bert"):
    from slimtune.core.mask import hold

    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.05)
    hold(delta, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss(delta.model, batch(name)) + (delta.penalty() if delta.penalty() is not None else 0)).backward()
        optimizer.step()


def parts(delta, site="encoder.0.attn.q"):
    p = {n.rpartition(".")[2]: t for n, t in delta.state().items() if n.startswith(f"{site}.dsee")}
    scale = delta.methods[0].scale
    return scale * p["B"] @ p["A"], scale * sparse_matrix(p["indices"], p["values"], 32, 32)


def test_two_groups_have_a_threshold_each():
    delta = trained(tiny("bert"), DSEE(**OWN))
    dsee_unstructured(delta, 0.2, 0.7, pooler=True)
    updated = [n for n in delta.masks if "query" in n or "value" in n]
    assert len(updated) == 4
    assert any("pooler" in n for n in delta.masks)
    for names, share in ((updated, 0.7), ([n for n in delta.masks if n not in updated], 0.2)):
        total = sum(delta.masks[n].numel() for n in names)
        assert sum(int((~delta.masks[n]).sum()) for n in names) == int(share * total + 1e-9)
    low, sparse = parts(delta)
    score = (low + sparse).abs()
    mask = delta.masks[QUERY]
    assert score[mask].min() >= score[~mask].max()
    rest = {n: t for n, t in delta.masks.items() if n not in updated}
    assert rest.keys() | set(updated) == delta.masks.keys()


@pytest.mark.parametrize("mode", list(SCORES))
def test_modes(mode):
    delta = trained(tiny("bert"), DSEE(**OWN, sites=("attn.q",), blocks=(0,)))
    low, sparse = parts(delta)
    weight = tiny("bert").bert.encoder.layer[0].attention.self.query.weight.detach()
    dsee_unstructured(delta, 0.0, 0.5, mode)
    said = {"ABS": low + sparse, "AB": low, "W": weight, "WAB": weight + low, "WABS": weight + low + sparse,
            "NABS": 1 / (low + sparse), "NAB": 1 / low}
    mask = delta.masks[QUERY]
    assert int(mask.sum()) == 512
    if mode in said:
        assert said[mode].abs()[mask].min() >= said[mode].abs()[~mask].max()
    delta.set_masks({})
    dsee_unstructured(delta, 0.0, 0.5, "WABS", compat="official")
    official = (weight + low / delta.methods[0].scale + sparse).abs()
    assert official[delta.masks[QUERY]].min() >= official[~delta.masks[QUERY]].max()


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_stage_two_trains_the_update_on_a_masked_backbone(name, tmp_path):
    delta = trained(tiny(name), DSEE(**OWN), name=name)
    indices = {n: t.clone() for n, t in delta.state().items() if n.endswith("indices")}
    found = dsee_unstructured(delta, 0.5)
    assert found.kept == found.total - found.total // 2
    before = {n: t.clone() for n, t in delta.state().items()}
    step_on(delta, 2, name)
    assert all(torch.equal(delta.state()[n], t) for n, t in indices.items())
    assert any(not torch.equal(t, before[n]) for n, t in delta.state().items() if n.endswith("values"))
    delta.save(tmp_path / "delta")
    again = load_delta(tiny(name), tmp_path / "delta")
    inputs = batch(name)
    with torch.no_grad():
        expected = delta.model(**inputs).logits
        assert torch.equal(again.model(**inputs).logits, expected)
        delta.merge(zeros="fill")
        torch.testing.assert_close(delta.model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_masked_map_is_the_equation():
    model = tiny("bert")
    delta = trained(model, DSEE(**OWN))
    dsee_unstructured(delta, 0.5)
    low, sparse = parts(delta)
    query, plain = (m.bert.encoder.layer[0].attention.self.query for m in (model, tiny("bert")))
    x = torch.randn(2, 5, 32)
    expected = x @ (plain.weight * delta.masks[QUERY] + low + sparse).T + plain.bias
    torch.testing.assert_close(query(x), expected, atol=1e-5, rtol=1e-5)


def test_heads_and_neurons_are_gated_away_and_sliced_out():
    model = tiny("bert")
    delta = trained(model, [DSEE(**OWN), Gates(l1=1e-3)])
    low, sparse = parts(delta)
    value = parts(delta, "encoder.0.attn.v")
    scale = delta.methods[0].scale
    score = sum(((a + b) / scale).abs().reshape(4, -1).sum(1) for a, b in ((low, sparse), value))
    dense = count_macs(tiny("bert"), tokens=16).total
    dsee_structured(delta, heads=1, neurons=0.25)
    gate = delta.masks["encoder.0.attn.heads.gates.c"].reshape(-1)
    assert (~gate).nonzero().flatten().tolist() == [int(score.argmin())]
    assert [int((~m).sum()) for n, m in delta.masks.items() if "mlp.act" in n] == [16, 16]
    with torch.no_grad():
        expected = model(**batch("bert")).logits
        shrink(model)
        torch.testing.assert_close(model(**batch("bert")).logits, expected, atol=1e-5, rtol=1e-4)
    attention = model.bert.encoder.layer[0].attention
    assert (attention.self.query.out_features, attention.output.dense.in_features) == (24, 24)
    assert count_macs(model, tokens=16).total / dense == pytest.approx(0.75)


def test_without_an_update_nothing_says_what_matters():
    delta = attach(tiny("bert"), LoRA())
    with pytest.raises(MethodError, match="no DSEE part"):
        dsee_unstructured(delta, 0.5)
    delta = attach(tiny("bert"), [DSEE(**OWN), Gates()], name="b")
    with pytest.raises(MethodError, match="has 4 heads"):
        dsee_structured(delta, heads=4)


def test_every_map_may_have_an_update_and_the_delta_says_what_was_pruned():
    delta = trained(tiny("bert"), DSEE(**OWN, sites=("linear",)))
    found = dsee_unstructured(delta, 0.9, 0.5, "AB")
    assert found.kept == found.total // 2  # there is no other map, for 0.9 to be a share of
    (told,) = delta.info["sparsity"]
    assert (told["kept"], told["denominator"], told["criterion"]["mode"]) == (found.kept, "base", "AB")


def test_random_masks_differ_from_site_to_site():
    delta = attach(tiny("bert", num_hidden_layers=6), DSEE(**OWN))
    dsee_unstructured(delta, 0.5, mode="random")
    masks = [m for n, m in delta.masks.items() if "query" in n or "value" in n]
    assert len({m.numpy().tobytes() for m in masks}) == len(masks) == 12


def test_what_is_no_share_or_mode_is_refused():
    delta = attach(tiny("bert"), [DSEE(**OWN), Gates()])
    for wrong in ({"ratio": 1.5}, {"ratio": 0.5, "update_ratio": -0.1}, {"ratio": 0.5, "mode": "BA"}):
        with pytest.raises(MethodError, match=r"share|no mode 'BA'"):
            dsee_unstructured(delta, **wrong)
    for wrong in ({"heads": -1}, {"neurons": 2}):
        with pytest.raises(MethodError, match=r"-1 were to go|share"):
            dsee_structured(delta, **wrong)
    assert not delta.masks
