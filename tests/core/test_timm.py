"""ViTs of timm, by what they have: a stand-in with timm's names of modules and its order of calls; timm is optional."""
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import slimtune as st
from slimtune.core import KeysValues
from slimtune.errors import AnatomyError, MethodError
from slimtune.testing import randomize
from slimtune.testing.small import small


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        share = (q @ k.mT / self.head_dim**0.5).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(share) @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(2 * dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(dim), Attention(dim, 4), *_two()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(dim), Mlp(dim), *_two()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _two() -> tuple[nn.Module, nn.Module]:
    return nn.Identity(), nn.Identity()


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class VisionTransformer(nn.Module):
    """A class token and two registers, as timm's reg models; pooled by the patches' mean, or the class."""

    def __init__(self, dim: int = 32, pool: str = "avg") -> None:
        super().__init__()
        self.num_prefix_tokens, self.global_pool = 3, pool
        self.patch_embed = PatchEmbed(dim)
        self.cls_token, self.reg_token = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 2, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 16, dim))
        self.pos_drop, self.patch_drop, self.norm_pre = nn.Dropout(0.0), nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(2)))
        self.norm, self.fc_norm = (nn.Identity(), nn.LayerNorm(dim)) if pool == "avg" else (
            nn.LayerNorm(dim), nn.Identity())
        self.head_drop, self.head = nn.Dropout(0.0), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(self.norm_pre(self.patch_drop(self.pos_drop(x)))))
        x = x[:, self.num_prefix_tokens:].mean(1) if self.global_pool == "avg" else x[:, 0]
        return self.head(self.head_drop(self.fc_norm(x)))


def standin(pool: str = "avg") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(pool=pool).double().eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_its_anatomy_is_known_and_not_guessed(pool: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anatomy = st.dissect(standin(pool))
    assert not anatomy.guessed
    assert (anatomy.model_type, anatomy.heads) == ("timm VisionTransformer", ("head",))
    tower = anatomy.tower("vision")
    assert (tower.width, tower.prefix_tokens, tower.entry, tower.final) == (32, 3, "norm_pre", "norm")
    sites = {s.name: s for s in anatomy.sites}
    assert [sites[f"vision.1.attn.{r}"].part for r in "qkv"] == [(0, 32), (32, 64), (64, 96)]
    assert {sites[f"vision.1.attn.{r}"].path for r in "qkv"} == {"blocks.1.attn.qkv"}
    assert (sites["vision.0.attn"].heads, sites["vision.0.attn"].head_dim) == (4, 8)
    assert sites["vision.0.mlp"].path == "blocks.0.mlp.drop2"
    assert sites["vision.norm.final"].path == ("fc_norm" if pool == "avg" else "norm")


def test_lora_goes_on_slices_of_the_fused_projection(pixels):
    """W_qkv + [B_q A_q ; 0 ; B_v A_v], and merged the same."""
    model, twin = standin(), standin()
    delta = randomize(st.attach(model, st.methods.LoRA(rank=2, alpha=2)))
    p, rows = dict(delta.named_parameters()), {"q": slice(0, 32), "v": slice(64, 96)}
    with torch.no_grad():
        for block in (0, 1):
            for role, part in rows.items():
                site = f"vision.{block}.attn.{role}.lora."
                twin.blocks[block].attn.qkv.weight[part] += p[site + "B"] @ p[site + "A"]
        twin.head.load_state_dict({n: p[f"head.head.{n}"] for n in ("weight", "bias")})
    out = model(pixels)
    torch.testing.assert_close(out, twin(pixels))
    delta.merge()
    torch.testing.assert_close(model(pixels), out)


def test_a_prompt_stands_behind_the_registers_and_is_taken_off(pixels):
    """Its tokens pass the blocks and do not reach the mean over the patches."""
    model, twin = standin(), standin()
    delta = randomize(st.attach(model, st.methods.PromptTuning(length=5, head="none")))
    prompt, = delta.parameters()
    x = twin.patch_embed(pixels) + twin.pos_embed
    front = torch.cat([twin.cls_token, twin.reg_token, prompt[None]], 1).expand(3, -1, -1)
    x = twin.blocks(torch.cat([front, x], 1))[:, 8:].mean(1)
    torch.testing.assert_close(model(pixels), twin.head(twin.fc_norm(x)))


class Fused(Attention):
    """As timm's with scaled_dot_product_attention: the rate is a child's, the flag its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class PatchDropout(nn.Module):
    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return torch.cat([x[:, :3], x[:, 3 + torch.randperm(16)[:int(16 * (1 - self.prob))]]], 1)


@pytest.mark.parametrize("which", ["attention", "patches"])
def test_the_backbones_dropout_is_off_while_a_prompt_trains(which: str, pixels):
    model = standin()
    if which == "patches":
        model.patch_drop = PatchDropout(0.5)
    else:
        for block in model.blocks:
            block.attn = Fused(32, 4).double()
            block.attn.attn_drop.p = 0.5
    delta = randomize(st.attach(model, st.methods.VPT(length=3, dropout=0.0)))
    quiet = model.eval()(pixels)
    torch.testing.assert_close(model.train()(pixels), quiet)
    assert all(m.training for m in model.modules())
    with delta.disabled():
        assert not torch.allclose(model(pixels), model(pixels))


@pytest.mark.parametrize("name", st.methods.names())
def test_each_method_trains_or_says_why_not(name: str, pixels):
    """It starts as it claims, trains, and is detached without a trace; extra keys and values are refused."""
    model = standin()
    plain, method = model(pixels), small(st.methods.get(name))
    if any(isinstance(part, KeysValues) for part in method.parts()):
        with pytest.raises(MethodError, match="AttentionInterface"):
            st.attach(model, method)
        assert torch.equal(model(pixels), plain)
        return
    delta = st.attach(model, method)
    if delta.methods[0].starts_as_identity():
        assert torch.equal(model(pixels), plain)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.1)
    model(pixels).square().sum().backward()
    resting = {"attn.k", "k_proj", "qkv.bias"}
    silent = [n for n, p in delta.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in silent if not any(r in n for r in resting) and n not in delta.resting()]
    delta.detach()
    assert torch.equal(model(pixels), plain)


def test_a_projection_that_no_hook_sees_is_refused():
    """timm's BEiT and EVA run F.linear with the weight of qkv and biases of their own."""
    model = standin()
    model.blocks[0].attn.q_bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(AnatomyError, match="runs it past its module"):
        st.attach(model, st.methods.LoRA())


def test_the_wrapper_of_transformers_is_looked_into(pixels):
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "timm_wrapper"

    class Wrapper(PreTrainedModel):
        base_model_prefix, config_class = "timm_model", Config

        def __init__(self) -> None:
            super().__init__(Config())
            self.timm_model = standin()

        def forward(self, pixel_values):
            return self.timm_model(pixel_values)

    model = Wrapper()
    delta = randomize(st.attach(model, st.methods.LoRA(rank=2)))
    assert (delta.anatomy.heads, delta.anatomy.tower("vision").path) == (("timm_model.head",), "timm_model")
    alone = standin()
    randomize(st.attach(alone, st.methods.LoRA(rank=2)))
    torch.testing.assert_close(model(pixels), alone(pixels))
