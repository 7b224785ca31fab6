"""The walk of the structural initialisation against loops, and Fisher information against one backward an example."""
import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.sideshape import read_shapes
from slimtune.core.structural import Walk, fisher
from slimtune.errors import DataError, MethodError
from slimtune.testing import batch, tiny
from slimtune.testing.tiny import loss

LST = st.methods.LST


def walk(model, r=4, **settings):
    anatomy = st.dissect(model)
    return Walk(anatomy, model.get_submodule, read_shapes(anatomy, model.get_submodule, r), **settings)


def top(rows, keep):
    """Numbers of the rows with the largest sums."""
    scores = [sum(row) for row in rows]
    return sorted(sorted(range(len(rows)), key=lambda i: -scores[i])[:keep])


def product(maps, columns):
    """|A * B * C| restricted to each one's columns, as lists."""
    cut = [m[:, c].abs().tolist() for m, c in zip(maps, columns, strict=True)]
    out = []
    for rows in zip(*cut, strict=True):
        out.append([])
        for values in zip(*rows, strict=True):
            total = 1.0
            for value in values:
                total *= value
            out[-1].append(total)
    return out


def t5_walk(weights, official):
    """The kept sets of a tiny T5 by the description, r = 4: d 8 of 32, inner 8 of 32, d_ff 16 of 64."""
    cuts, ends = {}, {}
    first = top(weights["shared.weight"].T.abs().tolist(), 8)
    for tower in ("encoder", "decoder"):
        kept = ends["encoder"] if official and tower == "decoder" else first
        for i in range(2):
            layers = [("self", "layer.0.SelfAttention"), *([("cross", "layer.1.EncDecAttention")] if tower == "decoder"
                                                           else [])]
            for kind, path in layers:
                w = {n: weights[f"{tower}.block.{i}.{path}.{n}.weight"] for n in "qkvo"}
                memory = ends["encoder"] if kind == "cross" and not official else kept
                rows = top(product([w["q"], w["k"], w["v"]], [kept, memory, memory]), 8)
                cuts |= {(tower, i, f"{kind}_q"): (rows, kept), (tower, i, f"{kind}_k"): (rows, memory),
                         (tower, i, f"{kind}_v"): (rows, memory), (tower, i, f"norm_{kind}"): (kept, None)}
                new = top(product([w["o"]], [rows]), 8)
                cuts[tower, i, f"{kind}_o"] = new, rows
                kept = new
            path = f"{tower}.block.{i}.layer.{len(layers)}.DenseReluDense"
            rows = top(product([weights[f"{path}.wi.weight"]], [kept]), 16)
            new = top(product([weights[f"{path}.wo.weight"]], [rows]), 8)
            cuts |= {(tower, i, "mlp_up"): (rows, kept), (tower, i, "norm_mlp"): (kept, None),
                     (tower, i, "mlp_down"): (new, rows)}
            kept = new
        ends[tower] = kept
        cuts[tower, None, "norm_top"] = kept, None
    return cuts


@pytest.mark.parametrize("official", [False, True])
def test_the_walk_is_the_papers(official: bool):
    """Against loops over rows; the official order is that of a difference of Python sets."""
    model = tiny("t5").double()
    found = walk(model, official=official).cuts
    wanted = t5_walk(dict(model.named_parameters()), official)
    assert found.keys() == wanted.keys()
    unsorted = 0
    for key, (rows, columns) in wanted.items():
        for own, right in zip(found[key], (rows, columns), strict=True):
            if right is None:
                assert own is None
                continue
            size = 64 if len(right) == 16 else 32
            order = list(set(range(size)) - (set(range(size)) - set(right))) if official else right
            assert own.tolist() == order, key
            unsorted += order != sorted(order)
    assert bool(unsorted) == official, "the case cannot tell the two orders apart"


def test_products_do_not_underflow():
    """Squared gradients of 1e-30 have products that float32 does not hold, and the same ranking."""
    model = tiny("t5")
    large = {id(p): p.detach().square() for p in model.parameters()}
    small = {k: v * 1e-30 for k, v in large.items()}
    for key, (rows, _) in walk(model, importance=large).cuts.items():
        assert torch.equal(walk(model, importance=small).cuts[key][0], rows), key


FAMILIES = {"bert": "bert.embeddings.word_embeddings", "bart": "model.shared", "gpt2": "transformer.wte",
            "vit": "vit.embeddings.patch_embeddings.projection", "electra": "electra.embeddings_project",
            "llama": "model.embed_tokens", "deberta-v2": "deberta.embeddings.word_embeddings"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_copied(family: str):
    """Rows and columns ascend, and every tensor of a side block is the backbone's at them, biases with their rows."""
    model = tiny(family)
    delta = st.attach(model, LST(reduction=4, head="none"))
    own = walk(model)
    weight = model.get_submodule(FAMILIES[family]).weight.detach()
    rows = weight.T if isinstance(model.get_submodule(FAMILIES[family]), nn.Embedding) else weight.flatten(1)
    block = delta.anatomy.towers[0]
    first = top(rows.abs().tolist(), 8)
    assert own.cuts[block.name, 0, "self_q"][1].tolist() == first
    for rows, columns in own.cuts.values():
        assert all(t is None or t.tolist() == sorted(set(t.tolist())) for t in (rows, columns))
    norm, side = own.cuts[block.name, 0, "norm_self"][0], own.cuts[block.name, 0, "self_o"][0]
    assert torch.equal(norm, side if block.post_norm else own.cuts[block.name, 0, "self_q"][1])
    assert torch.equal(own.cuts[block.name, 0, "mlp_up"][1], side)
    state, copied = delta.state(), 0
    for site in delta.anatomy.sites:
        name = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o"}.get(site.role)
        name = f"{'cross' if site.cross else 'self'}_{name}" if name else {
            "mlp.up": "mlp_up", "mlp.gate": "mlp_gate", "mlp.down": "mlp_down", "norm.attn": "norm_self",
            "norm.mlp": "norm_mlp", "norm.cross": "norm_cross"}.get(site.role)
        if name is None:
            continue
        host = model.get_submodule(site.path)
        full = host.weight.detach().T if site.transposed else host.weight.detach()
        part = slice(*site.part) if site.part else slice(None)
        rows, columns = own.cuts[site.tower, site.block, name]
        label = f"{site.tower}.{site.block}.block.lst.{name}"
        cut = full[part][rows] if columns is None else full[part][rows][:, columns]
        assert torch.equal(state[label], cut)
        bias = getattr(host, "bias", None)
        assert (bias is None) == (f"{label}_bias" not in state)
        assert bias is None or torch.equal(state[f"{label}_bias"], bias[part][rows])
        copied += 1
    others = ("gate", "rung")
    assert copied == sum(n.rpartition(".")[2] not in others and "_bias" not in n for n in state if ".block." in n)


def test_the_tables_of_t5_are_copied_whole_to_the_first_kept_block():
    model = tiny("t5")
    state = st.attach(model, LST(reduction=4, blocks=(1,))).state()
    tables = {n: t for n, t in state.items() if n.endswith(".table")}
    assert set(tables) == {"encoder.1.block.lst.table", "decoder.1.block.lst.table"}
    for name, table in tables.items():
        attention = model.get_submodule(name.partition(".")[0]).block[0].layer[0].SelfAttention
        assert torch.equal(table, attention.relative_attention_bias.weight)


def test_the_final_norm_is_copied_where_there_is_one():
    model = tiny("t5")
    kept = walk(model).cuts["decoder", None, "norm_top"][0]
    state = st.attach(model, LST(reduction=4)).state()
    assert torch.equal(state["decoder.top.lst.norm_top"], model.decoder.final_layer_norm.weight[kept])
    assert bool((st.attach(tiny("bert"), LST(reduction=4)).state()["encoder.top.lst.norm_top"] == 1).all())


def test_a_double_is_copied_as_it_is():
    model = tiny("gpt2").double()
    state = st.attach(model, LST(reduction=1)).state()
    assert torch.equal(state["decoder.0.block.lst.mlp_up"], model.transformer.h[0].mlp.c_fc.weight.T)


def test_a_quantised_backbone_starts_at_random_alone():
    model = tiny("bert")
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MethodError, match=r"encoder\.0\.mlp\.up, which is quantised"):
        st.attach(model, LST(reduction=4))
    a, b = (st.attach(model, LST(reduction=4, start="random"), name=n, seed=s).state() for n, s in (("a", 0), ("b", 1)))
    assert not torch.equal(a["encoder.0.block.lst.mlp_up"], b["encoder.0.block.lst.mlp_up"])


# Fisher information


def test_fisher_is_the_sum_of_squared_gradients():
    model, inputs = tiny("bert").train(), batch("bert")
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    found = fisher(model, [inputs, inputs], samples=4)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (model.training, model.bert.pooler.training) == (True, False)
    model.eval().requires_grad_(True)
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in (0, 1, 2, 0):
        model.zero_grad()
        loss(model, {k: v[i:i + 1] for k, v in inputs.items()}).backward()
        for n, p in model.named_parameters():
            wanted[n] += p.grad**2
    assert found.keys() == wanted.keys()
    for n, value in wanted.items():
        torch.testing.assert_close(found[n], value)


@pytest.mark.parametrize(("batches", "match"), [([], "there are none"), ([batch("bert", labels=False)], "Add labels")])
def test_fisher_needs_labelled_examples(batches, match):
    model = tiny("bert")
    model.bert.requires_grad_(False)
    with pytest.raises(DataError, match=match):
        fisher(model, batches)
    assert not any(p.requires_grad for p in model.bert.parameters())


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_calibrate_starts_the_blocks_by_fisher_information(family: str):
    model, data = tiny(family), [batch(family), batch(family, seed=1)]
    found = fisher(model, data, 5)
    by_id = {id(p): found[n] for n, p in model.named_parameters()}
    right = walk(model, importance=by_id)
    delta = st.attach(model, LST(reduction=4, start="fisher", samples=5))
    method, before = delta.methods[0], {n: t.clone() for n, t in delta.state().items()}
    assert method.needs_data
    assert not LST().needs_data
    method.calibrate(delta, data)
    assert delta.active
    moved = {n for n, t in delta.state().items() if not torch.equal(t, before[n])}
    assert any(".mlp_up" in n for n in moved)
    assert not [n for n in moved if n.rpartition(".")[2] in ("gate", "rung", "rung_bias", "weight", "top", "table")]
    for _, slot in delta.slots:
        for name in slot._parameters:
            if right.has(slot.site.tower, slot.site.block, name):
                assert torch.equal(slot._parameters[name], right.value(slot.site.tower, slot.site.block, name))
