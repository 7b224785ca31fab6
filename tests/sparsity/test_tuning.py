"""Tuned gates against least squares on A itself, column by column through the model."""
import pytest
import torch

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.prune import prune
from slimtune.sparsity.rearrange import opened, rearrange
from slimtune.sparsity.sublayer import run, sublayer
from slimtune.sparsity.target import targets
from slimtune.sparsity.tuning import damped, tune_gates
from slimtune.testing import batch, tiny

M = st.methods


def data(family, count=3):
    """Batches of other inputs; of texts the end of the first is padding."""
    found = []
    for seed in range(count):
        one, draw = {k: v.clone() for k, v in batch(family).items()}, torch.Generator().manual_seed(seed)
        if "input_ids" in one:
            one["input_ids"] = torch.randint(5, 90, one["input_ids"].shape, generator=draw)
            one["attention_mask"] = torch.ones_like(one["input_ids"])
            one["attention_mask"][0, -3:] = 0
        else:
            one["pixel_values"] = torch.randn(one["pixel_values"].shape, generator=draw).double()
        found.append(one)
    return found


def halved(family, model=None, sparsity=0.5):
    delta = st.attach((model or tiny(family)).double().eval(), M.Gates())
    prune(delta, sparsity, "fisher", on="gates", batches=data(family, 1), allocation="uniform")
    return delta


def loud(model):
    """Weights at which layers count for something beside the stream, as trained ones do."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 2 and ".layer." in n:
                p.mul_(8)
    return model


def module_input(model, path, one):
    kept = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    with torch.no_grad():
        model(**one)
    handle.remove()
    return kept[0]


BEHIND = {"bert": {"attn.heads": "bert.encoder.layer.{}.attention.output.LayerNorm",
                   "mlp.act": "bert.encoder.layer.{}.output.LayerNorm"},
          "gpt2": {"attn.heads": "transformer.h.{}.ln_2", "mlp.act": ["transformer.h.1.ln_1", "transformer.ln_f"]},
          "llama": {"attn.heads": "model.layers.{}.post_attention_layernorm",
                    "mlp.act": ["model.layers.1.input_layernorm", "model.norm"]},
          "vit": {"attn.heads": "vit.layers.{}.layernorm_after",
                  "mlp.act": ["vit.layers.1.layernorm_before", "vit.layernorm"]}}


@pytest.mark.parametrize("family", BEHIND)
def test_least_squares_on_the_stream(family):
    """b is the whole network's stream behind the layer; column u of A what the stream gains by opening gate u alone."""
    delta, batches = halved(family), data(family)
    model, gates = delta.model, targets(delta, "gates")
    found = tune_gates(delta, batches)
    assert list(found) == list(gates)
    tuned = {n: p.parameter.detach().clone() for n, p in gates.items()}
    slow = {n: delta.masks[n].double() for n in gates}  # untuned, to begin with

    def stream(values, path):
        with torch.no_grad():
            for n, gate in gates.items():
                gate.parameter.copy_(values[n])
        rows = []
        for one in batches:
            z = module_input(model, path, one)
            keep = one["attention_mask"].bool() if "attention_mask" in one else torch.ones(z.shape[:2]).bool()
            rows.append(z[keep].flatten())
        return torch.cat(rows)

    for name, gate in gates.items():
        site, paths = gate.sites[0], BEHIND[family]
        path = paths[site.role] if isinstance(paths[site.role], str) else paths[site.role][site.block]
        path = path.format(site.block)
        b = stream({n: torch.ones_like(v) for n, v in slow.items()}, path)
        none = stream({**slow, name: torch.zeros_like(slow[name])}, path)
        columns = []
        for u in delta.masks[name].nonzero().flatten().tolist():
            one = torch.zeros_like(slow[name])
            one[u] = 1
            columns.append(stream({**slow, name: one}, path) - none)
        a = torch.stack(columns, 1)
        ridge = torch.cat([a, torch.eye(a.shape[1], dtype=a.dtype)])  # damp = 1
        rest = torch.cat([b - none - a.sum(1), torch.zeros(a.shape[1], dtype=a.dtype)])
        d = torch.linalg.lstsq(ridge, rest[:, None]).solution[:, 0]
        slow[name] = slow[name].clone()
        slow[name][delta.masks[name]] = 1 + d
        torch.testing.assert_close(tuned[name], slow[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(found[name], tuned[name])
    assert any((tuned[n] - delta.masks[n].double()).abs().max() > 1e-3 for n in gates)
    assert delta.info["sparsity"][-1]["tuned"] == len(gates)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "swin", "dinov2", "bart"])
def test_each_layer_is_nearer_to_the_whole_network(family):
    delta, batches = halved(family), data(family)
    gates = targets(delta, "gates")

    def distance():
        total = 0.0
        name = list(gates)[-1]
        layer = sublayer(delta, gates[name])
        for one in batches:
            with opened(gates):
                whole = run(delta.model, one, layer)
            part = run(delta.model, one, layer)
            gap = whole.z - part.z if whole.adds_up else whole.y - part.y
            total += float(gap.square().sum())
        return total

    before = distance()
    tune_gates(delta, batches)
    assert distance() < before
    for name, gate in gates.items():
        assert not gate.parameter.detach()[~delta.masks[name]].any()
        assert gate.parameter.detach().abs().max() <= 10


def test_scales_between_a_layer_and_the_stream_leave_its_own_output():
    """DINOv2's LayerScale: r + y is not the stream behind, so that y alone is fitted, by lstsq on A."""
    model = tiny("dinov2").double().eval()
    for n, p in model.named_parameters():
        if "lambda1" in n:
            torch.nn.init.constant_(p, 0.1)
    delta, batches = halved("dinov2", model), data("dinov2")
    gates = targets(delta, "gates")
    name = next(iter(gates))
    layer = sublayer(delta, gates[name])
    with opened(gates):
        seen = [run(model, one, layer) for one in batches]
    assert not seen[0].adds_up
    x, y = torch.cat([s.x for s in seen]), torch.cat([s.y for s in seen])
    module, gate = model.get_submodule(layer.out.path), gates[name].parameter
    w, units = module.weight.detach(), gate.numel()
    step = w.shape[1] // units
    columns = [(x[:, u * step:(u + 1) * step] @ w[:, u * step:(u + 1) * step].mT).flatten()
               for u in delta.masks[name].nonzero().flatten().tolist()]
    a, b = torch.stack(columns, 1), (y - module.bias.detach()).flatten()
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    d = torch.linalg.lstsq(torch.cat([a, eye]), torch.cat([b - a.sum(1), eye[0] * 0])[:, None]).solution[:, 0]
    tune_gates(delta, batches)
    torch.testing.assert_close(gate.detach()[delta.masks[name]], 1 + d, rtol=1e-6, atol=1e-8)


def test_nothing_pruned_is_nothing_tuned():
    """Of the whole network the coefficients are 1, up to rounding."""
    delta = st.attach(tiny("bert").double(), M.Gates())
    prune(delta, 0.0, "random", on="gates")
    for c in tune_gates(delta, data("bert")).values():
        torch.testing.assert_close(c, torch.ones_like(c), rtol=0, atol=1e-8)


def test_a_coefficient_that_runs_away_ends_it(caplog):
    """A neuron that doubles another's part 30 times over: its twin is pruned, and it would have to be 31."""
    model = tiny("bert").double().eval()
    layer = model.bert.encoder.layer[0]
    up, down = layer.intermediate.dense, layer.output.dense
    with torch.no_grad():
        up.weight[1], up.bias[1] = up.weight[0], up.bias[0]
        down.weight[:, 1] = 30 * down.weight[:, 0]
    delta = st.attach(model, M.Gates())
    gates = targets(delta, "gates")
    masks = {n: torch.ones_like(g.parameter, dtype=torch.bool) for n, g in gates.items()}
    masks["encoder.0.mlp.act.gates.c"][1] = False
    delta.set_masks(masks)
    found = tune_gates(delta, data("bert"), damp=1e-6)
    assert list(found) == ["encoder.0.attn.heads.gates.c"]
    assert "encoder.0.mlp.act.gates.c would be" in caplog.text
    for name in list(gates)[1:]:
        assert torch.equal(gates[name].parameter.detach(), masks[name].double())
    delta.set_masks(masks)
    with torch.no_grad():
        gates["encoder.0.attn.heads.gates.c"].parameter.fill_(1)
    free = tune_gates(delta, data("bert"), damp=1e-6, most=40.0)
    assert free["encoder.0.mlp.act.gates.c"][0].item() == pytest.approx(31, abs=1e-3)


def test_the_damped_solution():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 6, generator=draw).double(), torch.randn(20, generator=draw).double()
    ridge = torch.cat([a, 0.7 * torch.eye(6, dtype=a.dtype)])
    want = torch.linalg.lstsq(ridge, torch.cat([b, torch.zeros(6, dtype=a.dtype)])[:, None]).solution[:, 0]
    torch.testing.assert_close(damped(a.mT @ a, a.mT @ b, 0.7), want)


def test_search_rearrange_tune_and_slice():
    """The whole framework without training: hidden states nearer to the whole network's, and sliced out as they are."""
    model, batches = loud(tiny("bert").double().eval()), data("bert")

    def states():
        with torch.no_grad():
            return torch.cat([model.bert(**{k: v for k, v in b.items() if k != "labels"}).last_hidden_state[
                b["attention_mask"].bool()] for b in batches])

    whole, delta = states(), st.attach(model, M.Gates())
    prune(delta, 0.5, "fisher", on="gates", batches=batches)
    rearrange(delta, batches)
    cut = states()
    tune_gates(delta, batches)
    tuned = states()
    assert (tuned - whole).norm() < 0.95 * (cut - whole).norm()
    st.shrink(model)
    torch.testing.assert_close(states(), tuned, rtol=1e-6, atol=1e-8)


def test_what_cannot_be_says_why():
    delta = halved("bert")
    with pytest.raises(MethodError, match="got none"):
        tune_gates(delta, [])
    with pytest.raises(MethodError, match="Choose damp > 0"):
        tune_gates(delta, data("bert"), damp=0)
    tune_gates(delta, data("bert"))
    with pytest.raises(MethodError, match="is not 1 any more"):
        tune_gates(delta, data("bert"))
    with pytest.raises(MethodError, match="is not pruned"):
        tune_gates(st.attach(tiny("bert"), M.Gates()), data("bert"))
    both = st.attach(tiny("bert"), [M.Gates(), M.LoRA(rank=2, sites=("attn.o",))])
    prune(both, 0.5, "random", on="gates")
    with pytest.raises(MethodError, match="and LoRA adds to it"):
        tune_gates(both, data("bert"))
