"""Adapter: a bottleneck at a site, and the ways to put one there; the unified view's design space.

    y <- y + s f(u),    f(u) = W_up act(W_down u + b_down) + b_up

    sequential:  u = y, the sub-layer's output;    parallel:  u = x, its input

An optional layer norm stands before the bottleneck or behind it. What W_down and W_up are made of is
`project`: dense here, other maps in a subclass.

Source: He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, table 1.
"""
from typing import ClassVar, Literal, TypeAlias

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from slimtune.core.add import Add
from slimtune.core.affine import ACTIVATIONS, Activation, affine, layer_norm, scalar
from slimtune.core.anatomy import Anatomy
from slimtune.core.bound import Bound
from slimtune.core.init import Init, Params, kaiming, normal, ones, truncated_normal, xavier, zeros
from slimtune.core.sites import Site

InitName: TypeAlias = Literal["bert", "lora", "houlsby", "small", "xavier", "zero"]

STARTS = {"bert": 0.02, "houlsby": 0.01, "small": 0.01}


class Adapter(Add):
    """A bottleneck of width m with a residual.

    Trains m (d_in + d_out) + m + d_out numbers a site, 2 d more with a layer norm, 1 more with a learned scale.
    init: "bert", all weights N(0, 0.02^2); "lora", down kaiming and up 0, an identity; "houlsby", N(0, 0.01^2)
    cut at two deviations; "small", N(0, 0.01^2); "xavier"; "zero", all 0, with which nothing but b_up ever gets a
    gradient: the adapter baseline in the code of arXiv 2203.12119. Biases start at 0.

    Shapes:
        x: (..., T, d_in), the sub-layer's input; y: (..., T, d_out), its output.
    """

    bottleneck: int = Field(64, ge=1, description="m")
    form: Literal["sequential", "parallel"] = Field("sequential", description="reads y, or x")
    scale: float = Field(1.0, description="s; the start of it when it is learned")
    learned_scale: bool = Field(False, description="train one scale a site")
    activation: Activation = "relu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the bottleneck, in training")
    layer_norm: Literal["none", "in", "out"] = Field("none", description="a layer norm before or behind f")
    init: InitName = "bert"
    sites: tuple[str, ...] = ("mlp",)

    identity: ClassVar[bool] = False

    def starts_as_identity(self) -> bool:
        return self.init in ("lora", "zero")

    def resting(self) -> dict[str, str]:
        if self.init == "zero":
            return {r"\.(down\w*|up|ln|ln_bias|gain)$": "all weights are 0, so no gradient ever passes"} | self.silent
        if self.init != "lora":
            return self.silent
        return {r"\.down\w*$|\.ln(_bias)?$": "the up-projection is 0 at the start, so the first gradient stops there",
                r"\.gain$": "the bottleneck's output is 0 at the start"} | self.silent

    def params(self, site: Site) -> Params:
        d_in = site.d_in if self.form == "parallel" else site.d_out
        norm = d_in if self.layer_norm == "in" else site.d_out
        extra = {} if self.layer_norm == "none" else {"ln": ones(norm), "ln_bias": zeros(norm)}
        if self.learned_scale:
            extra["gain"] = ones()
        return {**self.project_params("down", d_in, self.bottleneck), "down_bias": zeros(self.bottleneck),
                **self.project_params("up", self.bottleneck, site.d_out), "up_bias": zeros(site.d_out), **extra}

    def project_params(self, name: str, d_in: int, d_out: int) -> Params:
        """What a projection of the bottleneck trains, its bias apart."""
        return {name: _start(self.init, name, d_out, d_in)}

    def project(self, p: Bound, name: str, u: Tensor) -> Tensor:
        """A projection with its bias. Shapes: u (..., d_in) -> (..., d_out)."""
        return affine(u, p[name], p[f"{name}_bias"])

    def update(self, p: Bound, u: Tensor) -> Tensor:
        """s f(u), with its layer norm."""
        if self.layer_norm == "in":
            u = layer_norm(u, p["ln"], p["ln_bias"])
        h = ACTIVATIONS[self.activation](self.project(p, "down", u))
        if self.dropout and p.training:
            h = F.dropout(h, self.dropout)
        out = self.project(p, "up", h)
        if self.scale != 1.0:
            out = self.scale * out
        if self.learned_scale:
            out = out * scalar(p["gain"], out)
        return layer_norm(out, p["ln"], p["ln_bias"]) if self.layer_norm == "out" else out

    def reads(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        """u, for a placement of a subclass's own."""
        return x if self.form == "parallel" else y

    def compose(self, p: Bound, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        """The new y of an update."""
        return y + update

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        return self.compose(p, x, y, self.update(p, self.reads(p, x, y)))


class BehindNorm(Adapter):
    """An adapter behind the feed-forward network whose output passes the block's norm once more.

    Behind a post-norm residual sum z = h + res:    u = LN(z);  out = LN(f(u) + z)

    In a pre-norm block there is no such norm, and h <- h + f(h).
    """

    def where(self, anatomy: Anatomy) -> list[Site]:
        chosen = super().where(anatomy)
        norms = {(s.tower, s.block, s.role): s for s in anatomy.sites if s.role.startswith("norm.")}
        return [norms[s.tower, s.block, "norm.mlp"] if anatomy.tower(s.tower).post_norm and s.role == "mlp" else s
                for s in chosen]

    def compose(self, p: Bound, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        return p.again(update + x) if p.site.role == "norm.mlp" else y + update


def _start(init: str, name: str, d_out: int, d_in: int) -> Init:
    if init == "lora":
        return kaiming(d_out, d_in) if name == "down" else zeros(d_out, d_in)
    if init == "zero":
        return zeros(d_out, d_in)
    if init == "xavier":
        return xavier(d_out, d_in, fan_in=d_in, fan_out=d_out)
    make = truncated_normal if init == "houlsby" else normal
    return make(d_out, d_in, std=STARTS[init])
