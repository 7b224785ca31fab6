"""Ladder side-tuning against its paper: the ladder over the frozen hidden states, in plain torch."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.errors import MethodError, SiteError
from slimtune.testing import batch, check_method, doubled, meta, output, randomize, tiny
from slimtune.testing.tiny import NAMES

LST = st.methods.LST


def new_gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


FAMILIES = {  # act, eps, post-norm, scale of the scores at a head width of 2, then where the towers are
    "t5": SimpleNamespace(act=F.relu, eps=1e-6, post=False, scale=1.0, ends="{}.final_layer_norm", blocks="{}.block",
                          towers=("encoder", "decoder")),
    "bart": SimpleNamespace(act=F.gelu, eps=1e-5, post=True, scale=2**-0.5, ends="model.{}.layers.1",
                            blocks="model.{}.layers", towers=("encoder", "decoder")),
    "bert": SimpleNamespace(act=F.gelu, eps=1e-12, post=True, scale=2**-0.5, ends="bert.encoder.layer.1",
                            blocks="bert.encoder.layer", towers=("encoder",)),
    "gpt2": SimpleNamespace(act=new_gelu, eps=1e-5, post=False, scale=2**-0.5, ends="transformer.ln_f",
                            blocks="transformer.h", towers=("decoder",)),
    "vit": SimpleNamespace(act=F.gelu, eps=1e-12, post=False, scale=2**-0.5, ends="vit.layernorm", blocks="vit.layers",
                           towers=("vision",)),
}


def linear(p, name, x):
    return x @ p[name].T + p.get(f"{name}_bias", 0)


def norm(p, name, x, eps):
    if f"{name}_bias" in p:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * p[name] + p.get(f"{name}_bias", 0)


def attend(p, kind, u, memory, mask, f):
    q, k, v = (linear(p, f"{kind}_{n}", t).unflatten(-1, (4, 2)).transpose(1, 2)
               for t, n in ((u, "q"), (memory, "k"), (memory, "v")))
    return linear(p, f"{kind}_o", ((q @ k.mT * f.scale + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))


def block(p, s, mask, memory, cross_mask, f):
    steps = {"self": lambda u: attend(p, "self", u, u, mask, f),
             "cross": lambda u: attend(p, "cross", u, memory, cross_mask, f),
             "mlp": lambda u: linear(p, "mlp_down", f.act(linear(p, "mlp_up", u)))}
    for kind, step in steps.items():
        if kind != "cross" or memory is not None:
            s = (norm(p, f"norm_{kind}", s + step(s), f.eps) if f.post
                 else s + step(norm(p, f"norm_{kind}", s, f.eps)))
    return s


def ladder(group, tower, hidden, mask, memory, cross_mask, f, gate=True):
    s = linear(group(f"{tower}.start"), "weight", hidden[0])
    for i, h in enumerate(hidden[1:]):
        p = group(f"{tower}.{i}.block")
        mu = torch.sigmoid(p["gate"] / 0.1) if gate else 1.0
        s = mu * s + (1 - mu if gate else 1.0) * linear(p, "rung", h)
        s = block(p, s, mask(p) if callable(mask) else mask, memory, cross_mask, f)
    return s


def hidden_states(model, paths, inputs):
    """By list of blocks: the input of the first and the output of each."""
    seen, hooks = {path: [] for path in paths}, []
    for path in paths:
        layers = model.get_submodule(path)
        hooks.append(layers[0].register_forward_pre_hook(lambda m, a, to=seen[path]: to.append(a[0].detach())))
        hooks += [m.register_forward_hook(
            lambda m, a, y, to=seen[path]: to.append((y[0] if isinstance(y, tuple) else y).detach())) for m in layers]
    output(model, inputs)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def wide(family):
    return doubled(batch(family))


def case(family, **settings):
    """(model, delta with random values, inputs, hidden states of each tower before attaching)"""
    f, model, inputs = FAMILIES[family], tiny(family).double(), wide(family)
    hidden = hidden_states(model, [f.blocks.format(t) for t in f.towers], inputs)
    delta = st.attach(model, LST(reduction=4, head="none", **settings))
    return model, randomize(delta, std=0.3), inputs, hidden


def grouped(delta, key="lst"):
    named = dict(delta.named_parameters())
    return named, lambda prefix: {n.removeprefix(f"{prefix}.{key}."): t for n, t in named.items()
                                  if n.startswith(f"{prefix}.{key}.")}


def relative(model, tower):
    """T5's own buckets, with the side network's table."""
    attention = getattr(model, tower).block[0].layer[0].SelfAttention
    far = torch.arange(7)[None] - torch.arange(7)[:, None]
    index = attention._relative_position_bucket(far, tower == "encoder", 32, 128)
    return lambda table: table[index].permute(2, 0, 1)


@pytest.mark.parametrize(("family", "gate"), [("t5", True), ("t5", False), ("bart", True), ("bert", True),
                                              ("gpt2", True), ("vit", True)])
def test_equation(family: str, gate: bool):
    f = FAMILIES[family]
    model, delta, inputs, hidden = case(family, gate=gate)
    named, group = grouped(delta)
    seen, tower = {}, f.towers[-1]
    model.get_submodule(f.ends.format(tower)).register_forward_hook(
        lambda m, a, y: seen.update(out=y[0] if isinstance(y, tuple) else y))
    logits = output(model, inputs)
    padding = 0.0 if family == "vit" else (1 - inputs["attention_mask"].double())[:, None, None] * -1e9
    causal = torch.full((7, 7), -1e9, dtype=torch.float64).triu(1)
    masks, memory = {"encoder": padding, "vision": padding, "decoder": causal}, None
    if family == "gpt2":
        masks["decoder"] = causal + padding
    for t, states in zip(f.towers, hidden, strict=True):
        mask = masks[t]
        if family == "t5":
            mask = mask + relative(model, t)(group(f"{t}.0.block")["table"])
        s = ladder(group, t, states, mask, memory, padding, f, gate)
        memory = norm(group(f"{t}.{'top' if t == tower else 'memory'}"), "norm_top", s, f.eps)
    wanted = linear(group(f"{tower}.top"), "top", memory)
    read = {n: t for n, t in named.items() if "_k_bias" not in n}
    st.testing.assert_equation(seen["out"], wanted, read)
    if family == "t5":  # the model itself scales what goes into the tied head
        torch.testing.assert_close(logits, wanted * 32**-0.5 @ model.shared.weight.T)
        assert model.lm_head.weight is model.shared.weight


GATED = ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
SAME = [(n, {}) for n in NAMES
        if n not in ("mpnet", "deberta-v2", "beit", "dinov2", "dinov2_with_registers", "swin")]


@pytest.mark.parametrize(("family", "changes"), [*SAME, GATED])
def test_cut_at_r_1_the_side_blocks_are_the_backbones(family: str, changes, monkeypatch):
    """With the gates shut, a side network of full width repeats the backbone's hidden states.

    Rotary positions are left out of it, so that Llama's are all 0 here; MPNet, DeBERTa, BEiT and DINOv2 have more
    than roles say.
    """
    model, inputs = tiny(family, **changes), batch(family)
    if family in ("llama", "qwen2", "mistral"):
        inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    towers = st.dissect(model).towers
    hidden = hidden_states(model, [t.blocks[0].rpartition(".")[0] for t in towers], inputs)
    delta = st.attach(model, LST(reduction=1, dropout=0.0))
    with torch.no_grad():
        for n, p in delta.named_parameters():
            if n.endswith(".gate"):
                p.fill_(100.0)
            elif ".start." in n:
                p.copy_(torch.eye(32) if p.dim() == 2 else torch.zeros(32))
    seen = {t.name: [] for t in towers}
    rung, top = LST.rung, LST.top
    monkeypatch.setattr(LST, "rung", lambda self, p, s, h: seen[p.site.tower].append(s) or rung(self, p, s, h))

    def spy(self, p, s, h):
        seen[p.site.tower].append(s)  # BART's encoder has no norm of its own at its end
        return s if family == "bart" and "top" not in p else top(self, p, s, h)

    monkeypatch.setattr(LST, "top", spy)
    output(model, inputs)
    for own, right in zip(seen.values(), hidden, strict=True):
        assert len(own) == 3
        for s, h in zip(own, right, strict=True):
            torch.testing.assert_close(s, h, atol=2e-6, rtol=1e-5)


def test_every_gate_starts_half_open():
    state = st.attach(tiny("t5"), LST(reduction=4, blocks=(1,))).state()
    gates = {n: t for n, t in state.items() if n.endswith("gate")}
    assert set(gates) == {f"{t}.{b}.lst.gate" for t in ("encoder", "decoder") for b in ("0.dropped", "1.block")}
    assert all(float((g / LST().temperature).sigmoid()) == 0.5 for g in gates.values())
    assert not [n for n in st.attach(tiny("bert"), LST(gate=False, reduction=4)).state() if "gate" in n]


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_without_rungs_the_blocks_of_the_backbone_do_not_matter(family: str):
    model = tiny(family)
    delta = randomize(st.attach(model, LST(reduction=4)))
    before = output(model, batch(family)).detach()
    with torch.no_grad():
        for name, p in delta.named_parameters():
            if ".rung" in name:
                p.zero_()
    own = output(model, batch(family)).detach()
    assert not torch.equal(own, before)
    with torch.no_grad():
        for tower in delta.anatomy.towers:
            for path in tower.blocks:
                for name, p in model.get_submodule(path).named_parameters():
                    if "slimtune" not in name:
                        p.mul_(1.5)
    assert torch.equal(output(model, batch(family)), own)


@pytest.mark.parametrize(("settings", "kind", "match"), [
    ({"blocks": (0, 2)}, SiteError, "encoder 0 to 1, or -2 to -1"), ({"blocks": ()}, SiteError, "none is not in"),
    ({"norms": "all"}, MethodError, "would never train"), ({"reduction": 64}, MethodError, "more than the width 32"),
    ({"start": "none"}, MethodError, "start"), ({"temperature": 0}, MethodError, "temperature")])
def test_refusals(settings, kind, match):
    with pytest.raises(kind, match=match):
        st.attach(tiny("bert"), LST(**{"reduction": 4, **settings}))


def test_dropped_blocks_keep_the_contract():
    """Their gates count and never move, for the reason that `silent` gives."""
    report = check_method(LST(reduction=4, blocks=(-1,), start="random"), ["t5", "bert"])
    assert [p for p in report.pairs.values() if any("never move: its block has no side block" in n for n in p.notes)]


COUNTS = [
    (meta.t5_base_meta, (1, 2, 3, 5, 6, 7, 9, 10, 11), 3_878_712, "1.740"),
    (meta.t5_base_meta, None, 5_097_240, "2.287"),
    (meta.t5_base_meta, (2, 3, 6, 7, 10, 11), 2_660_184, "1.194"),
    (meta.t5_base_meta, (3, 7, 11), 1_441_656, "0.647"),
    (meta.t5_large_meta, tuple(range(1, 24, 2)), 9_057_328, "1.228"),
    (meta.t5_3b_meta, (-1,), 2_494_896, "0.087"),
]


@pytest.mark.parametrize(("backbone", "blocks", "numbers", "percent"), COUNTS)
def test_published_counts(backbone, blocks, numbers: int, percent: str):
    count = st.attach(backbone(vocab_size=32100), LST(blocks=blocks)).count()
    assert (count.adapter, f"{count.percent:.3f}") == (numbers, percent)


def test_dropping_a_block_removes_its_parameters_alone():
    """w = d / r, f = d_ff / r, i = heads (d_kv / r): a T5 block with its rung, the gates stay."""
    d, w, f, i = 32, 8, 16, 4 * 2
    attention, rest = 4 * w * i + w, 2 * w * f + w + (d + 1) * w
    whole = st.attach(tiny("t5"), LST(reduction=4)).count().adapter
    thinned = st.attach(tiny("t5"), LST(reduction=4, blocks=(0,))).count().adapter
    assert whole - thinned == (attention + rest) + (2 * attention + rest)
