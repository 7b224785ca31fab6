"""Anatomy: roles point at the right modules in every family, and a guess is told."""
import warnings

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core import Add, zeros
from slimtune.core.sites import widths
from slimtune.errors import AnatomyError, MethodError, SiteError
from slimtune.testing import NAMES, batch, output, tiny

CORE = {"attn.q", "attn.k", "attn.v", "attn.o", "attn.heads", "attn", "mlp.up", "mlp.act", "mlp.down", "mlp", "block",
        "norm.attn", "norm.mlp", "embed"}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_every_family_has_the_roles_and_true_widths(name: str):
    model = tiny(name)
    anatomy = st.dissect(model)
    assert not anatomy.guessed
    assert set(anatomy.roles) >= CORE
    for tower in anatomy.towers:
        for block in range(len(tower.blocks)):
            roles = {s.role for s in anatomy.sites if (s.tower, s.block) == (tower.name, block) and not s.cross}
            assert roles >= CORE - {"embed"}
    for site in anatomy.sites:
        module = model.get_submodule(site.path)
        if site.role.startswith(("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "mlp.gate")):
            d_in, d_out, transposed = widths(module)
            assert (site.d_in, site.transposed) == (d_in, transposed)
            assert site.d_out == (d_out if site.part is None else site.part[1] - site.part[0])
    assert len({s.name for s in anatomy.sites}) == len(anatomy.sites)


@pytest.mark.parametrize("name", NAMES)
def test_sublayer_sites_see_the_sublayers_input_and_output(name: str):
    """At `attn` and `mlp`, x is what the query (up) projection reads, y what the output (down) projection made."""
    model = tiny(name)
    anatomy = st.dissect(model)
    seen: dict[str, torch.Tensor] = {}

    class Watch(Add):
        sites: tuple[str, ...] = ("attn", "mlp")

        def params(self, site):
            return {"b": zeros(site.d_out)}

        def forward(self, p, x, y):
            seen[f"{p.site.name}.x"], seen[f"{p.site.name}.y"] = x, y
            return y + p["b"]

    inputs = {}
    for site in anatomy.sites:
        if site.role in ("attn.q", "mlp.up", "attn.o", "mlp.down"):
            key = ("cross." if site.cross else "") + f"{site.tower}.{site.block}.{site.role}"

            def note(module, args, out, key=key):
                inputs.setdefault(key, (args[0].detach(), out.detach()))

            model.get_submodule(site.path).register_forward_hook(note)
    st.attach(model, Watch(head="none"))
    output(model, batch(name))
    for site in anatomy.sites:
        if site.role not in ("attn", "mlp"):
            continue
        key = ("cross." if site.cross else "") + f"{site.tower}.{site.block}."
        first, last = ("attn.q", "attn.o") if site.role == "attn" else ("mlp.up", "mlp.down")
        assert torch.equal(seen[f"{site.name}.x"], inputs[key + first][0])
        assert torch.equal(seen[f"{site.name}.y"], inputs[key + last][1])


@pytest.mark.parametrize(("name", "changes", "prefix"), [
    ("vit", {}, 1), ("deit", {}, 2), ("beit", {}, 1), ("dinov2", {}, 1), ("dinov2_with_registers", {}, 3),
    ("dinov2_with_registers", {"num_register_tokens": 5}, 6)])
def test_the_patches_stand_behind_the_prefix_tokens(name: str, changes: dict, prefix: int):
    """Another first patch changes, of what enters the first block, the token behind the prefix alone."""
    model, pixels = tiny(name, **changes), batch(name)["pixel_values"]
    tower = st.dissect(model).tower("vision")
    assert tower.prefix_tokens == prefix
    before = model.get_submodule(tower.entry)(pixels)
    pixels[..., :4, :4] += 1
    moved = (model.get_submodule(tower.entry)(pixels) != before).any(-1).all(0)
    assert moved.nonzero().flatten().tolist() == [prefix]
    convpass = st.methods.Convpass(bottleneck=2)
    assert {site.prefix for site in convpass.where(st.dissect(model))} == {prefix}


def test_roles_that_depend_on_the_config():
    swiglu = st.dissect(tiny("dinov2_with_registers", use_swiglu_ffn=True))
    assert {"mlp.up", "mlp.gate", "mlp.down"} <= set(swiglu.roles)
    for pooled, path in ((True, "beit.pooler.layernorm"), (False, "beit.layernorm")):
        anatomy = st.dissect(tiny("beit", use_mean_pooling=pooled))
        assert [s.path for s in anatomy.sites if s.role == "norm.final"] == [path]


def test_patterns_select_by_role_kind_tower_and_block():
    anatomy = st.dissect(tiny("t5"))
    assert len(anatomy.select(("attn.q",))) == 6
    assert len(anatomy.select(("cross.attn.q",))) == 2
    assert len(anatomy.select(("self.attn.q",))) == 4
    assert len(anatomy.select(("encoder.attn.q",))) == 2
    assert len(anatomy.select(("decoder.self.attn.?",), blocks=(-1,))) == 4
    assert [s.name for s in anatomy.select(("decoder.1.cross.attn.v",))] == ["decoder.1.cross.attn.v"]
    assert [s.tower for s in st.dissect(tiny("clip")).select(("vision.mlp.down",))] == ["vision", "vision"]


def test_what_does_not_exist_is_an_error_that_names_what_does():
    anatomy = st.dissect(tiny("bert"))
    with pytest.raises(SiteError, match=r"'mlp.gate', which bert does not have[\s\S]*It has: attn.q[\s\S]*'mlp.act'"):
        anatomy.select(("mlp.gate",), who="method LoRA")
    with pytest.raises(SiteError, match=r"blocks \[7\][\s\S]*encoder 0 to 1"):
        anatomy.select(("attn.q",), blocks=(7,))
    model = tiny("bert")
    keys = list(model.state_dict())
    with pytest.raises(SiteError):
        st.attach(model, st.methods.LoRA(sites=("attn.q", "atn.v")))
    assert list(model.state_dict()) == keys


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.out_proj((self.q_proj(x) @ self.k_proj(x).mT).softmax(-1) @ self.v_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln1, self.ln2 = Attention(), nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.fc2(self.fc1(self.ln2(x)).relu())


class Home(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_an_unknown_model_is_guessed_and_the_guess_is_shown():
    model = Home()
    with pytest.warns(UserWarning, match=r"does not know 'Home'[\s\S]*attn.q[\s\S]*blocks.0.attn.q_proj"):
        delta = st.attach(model, st.methods.LoRA(rank=2))
    assert delta.count().adapter == 3 * 2 * 2 * (8 + 8)
    before = model(torch.arange(5)[None])
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.1)
    assert not torch.equal(model(torch.arange(5)[None]), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        st.attach(model, st.methods.LST(reduction=2), name="lst")


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(AnatomyError, match="no list of Transformer blocks"):
        st.attach(nn.Sequential(nn.Linear(3, 3)), st.methods.LoRA())


def test_a_quantised_tensor_is_not_trained():
    model = tiny("bert")
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    layer.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MethodError, match="quantised"):
        st.attach(model, st.methods.Full())
