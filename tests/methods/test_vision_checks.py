"""Checks of the vision papers that need no weights: tables of sizes, what factors can represent, starts of heads."""
import math

import pytest
import torch

import slimtune as st
from slimtune.core.unfreeze import base_parameters
from slimtune.data import elevater, vtab
from slimtune.testing import batch, doubled, loss, meta, randomize, tiny

M = st.methods
VTAB = [task.classes for task in vtab.TASKS.values()]
FGVC = [200, 555, 102, 120, 196]
"""Classes of CUB, NABirds, Flowers, Dogs and Cars."""
SWIN = meta.swin_base_meta()


def times(model, method, classes: list[int], width: int) -> float:
    """What a backbone and all tasks take, in backbones; full tuning keeps no backbone beside its copies."""
    delta = st.attach(model, method)
    count = delta.count()
    delta.detach()
    own = isinstance(method, M.Full)
    total = len(classes) * (count.adapter + count.norms) + sum(c * (width + 1) for c in classes)
    return (0 if own else 1) + total / count.backbone


@pytest.mark.parametrize(("method", "vit", "swin"), [
    (M.Full(), 24.02, 19.01), (M.LinearProbe(), 1.02, 1.01), (M.PartialK(), 3.00, 3.77), (M.MLPHead(), 1.35, 1.47),
    (M.BitFit(), 1.05, None)], ids=repr)
def test_vpts_tables_of_total_sizes(method, vit: float, swin: float | None):
    """arXiv 2203.12119, tables 1 (24 tasks of VTAB and FGVC) and 2 (19 tasks); VPT's own rows are in test_vpt.py."""
    assert round(times(meta.vit_b16_meta(), method, VTAB + FGVC, 768), 2) == vit
    if swin is not None:
        assert round(times(SWIN, method, VTAB, 1024), 2) == swin


def test_biases_of_swin():
    """The paper's 0.201M are all names with "bias" in them, the tables of relative positions too; ours are biases."""
    delta = st.attach(SWIN, M.BitFit())
    own = delta.count().adapter
    delta.detach()
    tables = sum(p.numel() for n, p in base_parameters(SWIN).items() if "relative_position_bias_table" in n)
    assert (own, tables, own + tables) == (137_216, 63_544, 200_760)
    assert round((own + tables) * 19 / 86_743_224 + 940 * 1025 / 86_743_224 + 1, 2) == 1.06


@pytest.mark.parametrize(("reduction", "numbers"), [(8, 1_779_840), (64, 230_544), (256, 64_548)])
def test_vpts_adapters(reduction: int, numbers: int):
    delta = st.attach(meta.vit_b16_meta(), M.Pfeiffer(bottleneck=768 // reduction))
    assert delta.count().adapter == numbers


def test_the_adapter_of_vpts_code_never_moves():
    """All weights at 0: two steps of SGD move the bias of the up-projection, and the head."""
    model = tiny("vit")
    delta = st.attach(model, M.Pfeiffer(bottleneck=4, init="zero", activation="gelu"))
    before = {n: p.clone() for n, p in delta.state().items()}
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch("vit")).backward()
        optimizer.step()
    moved = {n for n, p in delta.state().items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith(".up_bias") or n.startswith("head.")}


def test_the_start_of_vpts_heads_changes_nothing():
    """Its bias of -log((1 - 0.01) / 0.01) in every class: the same loss, the same gradients, in head and prompts."""
    bias, found = -math.log(0.99 / 0.01), []
    assert round(bias, 3) == -4.595
    inputs = doubled(batch("vit"))
    for start in (0.0, bias):
        model = tiny("vit").double()
        delta = randomize(st.attach(model, M.VPT(length=3)))
        delta.tensors()["head.classifier.bias"].data += start
        value = loss(model, inputs)
        found.append((value, torch.autograd.grad(value, list(delta.parameters()))))
    torch.testing.assert_close(found[0], found[1])


def update(delta, role: str) -> torch.Tensor:
    """Delta W of a site, (d_in, d_out), for row vectors: by what it does to the identity."""
    slot = next(s for name, s in delta.slots if s.site.role == role and s.site.block == 0)
    x = torch.eye(slot.site.d_in).double()
    host = delta.model.get_submodule(slot.site.path)
    return (host(x) - host.forward(x)).detach()


def fact(rank: int):
    model = tiny("vit").double()
    return randomize(st.attach(model, M.FacT(rank=rank, blocks=(0,), sites=("attn.q", "attn.k", "attn.v"))))


def test_fact_of_full_rank_is_any_update():
    """r = d with U = V = I: Delta W_i = Sigma_i, whatever it is."""
    delta, wanted = fact(32), torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    state = {n: torch.eye(32) if "U_" in n or "V_" in n else p for n, p in delta.state().items()}
    roles = ("attn.q", "attn.k", "attn.v")
    state |= {f"vision.0.{role}.fact.core": w[None] for role, w in zip(roles, wanted, strict=True)}
    delta.load_state(state)
    torch.testing.assert_close(torch.stack([update(delta, role) for role in roles]), wanted)


def test_facts_slices_are_told_apart_by_their_core_alone():
    """q, k and v with each other's Sigma have each other's update."""
    delta = fact(3)
    before = {role: update(delta, role) for role in ("attn.q", "attn.k", "attn.v")}
    state, turned = delta.state(), dict(zip(before, list(before)[1:] + list(before)[:1], strict=True))
    state = {n: p.clone() for n, p in state.items()}
    delta.load_state(state | {f"vision.0.{a}.fact.core": state[f"vision.0.{b}.fact.core"] for a, b in turned.items()})
    for a, b in turned.items():
        torch.testing.assert_close(update(delta, a), before[b])
    assert not torch.allclose(before["attn.q"], before["attn.k"])


def test_kadaptations_numbers_with_elevaters_heads():
    """arXiv 2203.16329's README: the mean over 20 sets, heads on CLIP's 512 features."""
    heads = 513 * sum(task.classes for task in elevater.TASKS.values()) / 20
    for method, published in ((M.KAdaptation(), 79_699), (M.LoRA(rank=4), 176_979), (M.LinearProbe(), 29_523)):
        assert round(st.attach(meta.vit_b16_meta(), method).count().adapter + heads) == published


def test_the_rank_of_an_update_of_kadaptation():
    """At most n ranks of A_i times ranks of B_i: 32 of 768 on ViT-B's width."""
    model = tiny("vit", hidden_size=128, num_hidden_layers=1, num_attention_heads=4).double()
    delta = randomize(st.attach(model, M.KAdaptation(division=32, scale=1.0)), std=1.0)
    q = model.vit.layers[0].attention.q_proj
    rows = torch.cat([torch.eye(128), torch.zeros(1, 128)]).double()
    change = (q(rows) - q.forward(rows)).detach()
    assert torch.linalg.matrix_rank(change[:-1] - change[-1]) == 32  # without the bias
    assert len(delta.slots) == 2
