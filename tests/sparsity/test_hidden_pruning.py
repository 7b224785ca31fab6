"""Hidden dimensions and whole layers by the one engine: scores, masks that hold, and what is sliced in the end."""
from pathlib import Path

import pytest
import torch

import slimtune as st
from slimtune.core.mask import hold
from slimtune.errors import MethodError
from slimtune.sparsity.budget import Budget
from slimtune.sparsity.prune import prune, prune_in_rounds
from slimtune.sparsity.structure import gate_scores
from slimtune.sparsity.target import denominator, targets
from slimtune.testing import batch, loss, output, tiny

NAME = "shared.gates.hidden"
DATA = [batch("bert")]


def attached(family: str = "bert", double: bool = False, **changes):
    model = tiny(family, **changes)
    model = model.double() if double else model
    return model, st.attach(model, [st.methods.Full(), st.methods.Gates(hidden=True)])


def bert(layer, j):
    at = layer.attention
    yield from (m.weight[:, j] for m in (at.self.query, at.self.key, at.self.value, layer.intermediate.dense))
    yield from (at.output.dense.weight[j], layer.output.dense.weight[j])


def gpt2(layer, j):
    yield from (layer.attn.c_attn.weight[j], layer.mlp.c_fc.weight[j])
    yield from (layer.attn.c_proj.weight[:, j], layer.mlp.c_proj.weight[:, j])


def llama(layer, j):
    at, mlp = layer.self_attn, layer.mlp
    yield from (m.weight[:, j] for m in (at.q_proj, at.k_proj, at.v_proj, mlp.up_proj, mlp.gate_proj))
    yield from (at.o_proj.weight[j], mlp.down_proj.weight[j])


@pytest.mark.parametrize(("family", "parts", "path"), [
    ("bert", bert, "bert.encoder.layer"), ("gpt2", gpt2, "transformer.h"), ("llama", llama, "model.layers")])
def test_the_sum_over_what_would_go(family: str, parts, path: str):
    model, delta = attached(family, double=True)
    hidden, base = targets(delta, "hidden"), targets(delta, "base")
    found = gate_scores(delta, hidden, {n: t.parameter.detach() ** 2 for n, t in base.items()})
    slow = [sum(float((w.detach() ** 2).sum()) for layer in model.get_submodule(path) for w in parts(layer, j))
            for j in range(32)]
    assert list(found) == [NAME]
    torch.testing.assert_close(found[NAME].double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("family", "by", "rel"), [("bert", 1e-5, 1e-6), ("gpt2", 1e-5, 1e-6), ("llama", 1e-2, 1e-2)])
def test_the_gradient_of_a_coefficient(family: str, by: float, rel: float):
    """Against differences of the loss with one coefficient a little off 1 at all norms."""
    model, delta = attached(family, double=True)
    c = delta.tensors()[NAME]
    inputs = batch(family, labels=False)
    output(model, inputs).square().sum().backward()  # losses of language, and norms of LLaMA, are in float32
    with torch.no_grad():
        for j in (0, 13, 31):
            ends = []
            for step in (by, -by):
                c[j] = 1 + step
                ends.append(output(model, inputs).square().sum().item())
                c[j] = 1
            assert c.grad[j].item() == pytest.approx((ends[0] - ends[1]) / 2 / by, rel=rel, abs=1e-8)


@pytest.mark.parametrize("criterion", ["random", "taylor", "fisher", "snip", "magnitude", "grasp"])
def test_a_share_of_the_dimensions_goes_and_stays_away(criterion: str):
    model, delta = attached()
    by = "weights" if criterion == "magnitude" else "own"
    found = prune(delta, 0.3, criterion, on="hidden", by=by, batches=DATA)
    assert (found.kept, found.total, found.denominator) == (32 - 9, 32, denominator("hidden"))
    assert set(delta.masks) == {NAME}
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    hold(delta, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, DATA[0]).backward()
        optimizer.step()
    assert torch.equal(delta.tensors()[NAME] != 0, delta.masks[NAME])
    with torch.no_grad():
        told = output(model, DATA[0])
        assert st.shrink(model).hidden == {"encoder": 23}
        torch.testing.assert_close(output(model, DATA[0]), told, rtol=1e-5, atol=1e-5)


def test_in_rounds_with_heads_and_neurons_and_from_a_file(tmp_path: Path):
    """Width in rounds, then heads and neurons to a budget, in one delta; saved, loaded, sliced, saved as a model."""
    model, delta = attached()
    assert prune_in_rounds(delta, 0.5, 3, "taylor", on="hidden", batches=DATA).kept == 16
    prune(delta, 0.5, "taylor", on="gates", allocation=Budget(tokens=16), batches=DATA)
    assert [entry["denominator"] for entry in delta.info["sparsity"]] == ["hidden", "gates"]
    delta.save(tmp_path / "delta")
    other = tiny("bert")
    st.load(other, tmp_path / "delta")
    with torch.no_grad():
        told = output(model, DATA[0])
        assert torch.equal(output(other, DATA[0]), told)
        before = st.count_macs(other, 16).total
        report = st.shrink(other)
        torch.testing.assert_close(output(other, DATA[0]), told, rtol=1e-5, atol=1e-5)
        assert report.hidden == {"encoder": 16}
        assert 0.2 * before < st.count_macs(other, 16).total < 0.35 * before  # half of half, and attention's own
        st.save_model(other, tmp_path / "model")
        assert torch.equal(output(st.load_model(tmp_path / "model"), DATA[0]), output(other, DATA[0]))


def test_a_merge_at_the_old_width_is_there_only_while_all_dimensions_live():
    model, delta = attached("gpt2")
    inputs = batch("gpt2")
    with torch.no_grad():
        delta.tensors()[NAME].uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        told = output(model, inputs)
        delta.merge()
        torch.testing.assert_close(output(model, inputs), told)
        delta.unmerge()
        assert torch.equal(output(model, inputs), told)
        twin, copy = attached("gpt2")
        copy.tensors()[NAME].copy_(delta.tensors()[NAME])
        assert st.shrink(twin).hidden == {}
        torch.testing.assert_close(output(twin, inputs), told)
        prune(delta, 0.25, on="hidden")
        with pytest.raises(MethodError, match="8 hidden dimensions are pruned"):
            delta.merge()
        assert st.shrink(model).hidden == {"decoder": 24}


@pytest.mark.parametrize(("options", "message"), [
    ({"allocation": Budget()}, "cost the same each"), ({"criterion": "sparsegpt"}, "gates are none"),
    ({"granularity": "2:4", "sparsity": None, "gates": False}, "Gates\\(hidden=True\\)"),
    ({"granularity": "layer"}, "in no one block")])
def test_refused(options: dict, message: str):
    model = tiny("bert")
    delta = st.attach(model, st.methods.Gates(hidden=options.pop("gates", True)))
    with pytest.raises(MethodError, match=message):
        prune(delta, **{"sparsity": 0.5, "criterion": "taylor", "on": "hidden", "batches": DATA, **options})
    assert not delta.masks


def test_heads_and_neurons_are_counted_without_the_stream():
    _, delta = attached()
    assert sum(t.parameter.numel() for t in targets(delta, "gates").values()) == 2 * (4 + 64)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "llama"])
def test_whole_layers(family: str):
    """An attention or a network as one unit: in each block, all of its heads or neurons live, or none."""
    depth = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    model, delta = attached(family, **depth)
    inputs = batch(family)
    found = prune(delta, 2 / 6, "taylor", on="gates", granularity="whole", allocation="global", batches=[inputs])
    counts = {name: kept for name, (kept, _) in found.tensors.items()}
    assert len(found.tensors) == 6
    assert sorted(kept > 0 for kept in counts.values()) == [False] * 2 + [True] * 4
    with torch.no_grad():
        told = output(model, inputs)
        report = st.shrink(model)
        torch.testing.assert_close(output(model, inputs), told, rtol=1e-5, atol=1e-5)
    kept = report.heads | report.neurons
    assert {f"{site}.gates.c": n for site, n in kept.items()} == counts
    units = {name: total for name, (_, total) in found.tensors.items()}
    macs = st.count_macs(tiny(family, **depth))
    each = {f"{s}.gates.c": c for s, c in (macs.heads | macs.neurons).items()}
    assert report.macs == (macs.total, macs.total - sum(units[n] * each[n] for n, k in counts.items() if not k))


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "llama"])
def test_whole_blocks(family: str):
    """The block whose coefficients matter least goes: of a tower with norms before, from the list of blocks too."""
    depth = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    model, delta = attached(family, **depth)
    inputs = batch(family)
    gates = targets(delta, "gates")
    g = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(t.parameter.shape, generator=g) * (0.7 if t.sites[0].block == 1 else 1)
              for n, t in gates.items()}
    mean = [torch.cat([s for n, s in scores.items() if gates[n].sites[0].block == b]).mean() for b in range(3)]
    gone = int(torch.stack(mean).argmin())
    assert gone == 1
    with torch.no_grad():
        for n, t in gates.items():
            t.parameter.copy_(scores[n])
    found = prune(delta, 0.34, "magnitude", on="gates", granularity="layer")
    assert {gates[n].sites[0].block for n, (kept, total) in found.tensors.items() if kept < total} == {gone}
    assert {kept for n, (kept, _) in found.tensors.items() if gates[n].sites[0].block == gone} == {0}
    with torch.no_grad():
        told = output(model, inputs)
        report = st.shrink(model)
        torch.testing.assert_close(output(model, inputs), told, rtol=1e-5, atol=1e-5)
    assert list(report.blocks.values()) == [3 if family == "bert" else 2]
    assert report.macs is not None
    assert report.macs[1] * 3 == report.macs[0] * 2
