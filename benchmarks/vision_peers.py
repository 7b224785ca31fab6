"""The peers of `vpt.py`: ViT's blocks with FacT, LoRA, an adapter or deep prompts written into them by hand.

Each is the shortest code for this one model: what a task has in common is computed once, and nothing is switched,
masked or saved. `put` changes a ViT of transformers in place.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, RANK, FACT_RANK, WIDTH = 50, 8, 16, 8


class FactLinear(nn.Module):
    """y + x U Sigma V^T, the d x d slices of a map that is wider side by side in one product."""

    def __init__(self, linear: nn.Linear, U: nn.Parameter, V: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.U, self.V, r = linear, U, V, U.shape[0]
        self.wide = linear.out_features > linear.in_features
        slices = max(linear.in_features, linear.out_features) // U.shape[1]
        self.core = nn.Parameter(torch.randn(slices, r, r) * r**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            A, B = self.U, (self.V @ self.core.mT).flatten(0, 1)
        else:
            A, B = (self.core.mT @ self.U).transpose(0, 1).flatten(1), self.V
        return self.linear(x) + F.linear(F.linear(x, A), B)


class FactAttention(nn.Module):
    """Attention with FacT on q, k, v and o; x U is computed once for q, k and v."""

    def __init__(self, own: Any, U: nn.Parameter, V: nn.Parameter) -> None:
        super().__init__()
        self.own, self.U, self.V, r = own, U, V, U.shape[0]
        self.core = nn.Parameter(torch.randn(3, r, r) * r**-0.5)
        own.o_proj = FactLinear(own.o_proj, U, V)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        h = F.linear(x, self.U)
        q, k, v = (linear(x) + F.linear(h @ S, self.V) for linear, S in
                   zip((self.own.q_proj, self.own.k_proj, self.own.v_proj), self.core, strict=True))
        return attend(self.own, q, k, v), None


class LoraLinear(nn.Module):
    """y + s (x A^T) B^T."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * rank**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


class AdapterMLP(nn.Module):
    """h + up(GELU(down(h))) behind an MLP."""

    def __init__(self, mlp: nn.Module, d: int, width: int) -> None:
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return h + self.up(F.gelu(self.down(h)))


class PromptAttention(nn.Module):
    """Attention that also sees keys and values of a prompt, which goes through the block's norm and projections."""

    def __init__(self, own: Any, norm: nn.Module, length: int) -> None:
        super().__init__()
        self.own, self.keep = own, [norm]  # in a list: the norm stays the block's own
        self.prompt = nn.Parameter(torch.empty(length, own.q_proj.in_features).uniform_(-0.0625, 0.0625))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        p = self.keep[0](self.prompt)
        k, v = (torch.cat([linear(p).expand(len(x), -1, -1), linear(x)], 1)
                for linear in (self.own.k_proj, self.own.v_proj))
        return attend(self.own, self.own.q_proj(x), k, v), None


def attend(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return own.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def put(model: Any, kind: str) -> None:
    """fact, lora, adapter or vpt, in every block."""
    d = model.config.hidden_size
    U, V = nn.Parameter(torch.randn(FACT_RANK, d) * 0.02), nn.Parameter(torch.zeros(d, FACT_RANK))
    for block in model.vit.layers:
        if kind == "adapter":
            block.mlp = AdapterMLP(block.mlp, d, WIDTH)
        elif kind == "vpt":
            block.attention = PromptAttention(block.attention, block.layernorm_before, LENGTH)
        elif kind == "lora":
            for name in ("q_proj", "v_proj"):
                setattr(block.attention, name, LoraLinear(getattr(block.attention, name), RANK, 16 / RANK))
        else:
            block.attention = FactAttention(block.attention, U, V)
            for name in ("fc1", "fc2"):
                setattr(block.mlp, name, FactLinear(getattr(block.mlp, name), U, V))
