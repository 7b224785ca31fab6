"""MLP head: hidden layers between the frozen features and the task head.

    h_i = drop(ReLU(W_i h_{i-1} + b_i)),  i = 1 .. k - 1;    logits = W h_{k-1} + b

Source: the baseline of Jia et al., 2022, "Visual Prompt Tuning", arXiv 2203.12119, section 4 (MLP-k). Its batch norms
are left out: they tie the examples of a batch to one another.
"""
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from slimtune.core import Add, Bound, Builder, Params, Site, affine, join, kaiming, zeros
from slimtune.errors import MethodError


class MLPHead(Add):
    """k - 1 hidden layers of the features' width in front of a linear head.

    Trains (k - 1) (d^2 + d) numbers: 1,181,184 on ViT-B/16 at k = 3, head apart.

    Shapes:
        x: (B, d), what enters the head.
    """

    layers: int = Field(3, ge=2, description="k, the head's own layer counted")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="behind each hidden layer, in training")

    identity: ClassVar[bool] = False

    def install(self, build: Builder) -> None:
        linears = [(join(head, path), module) for head in build.anatomy.heads
                   for path, module in build.module(head).named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise MethodError(f"MLPHead cannot go on this {build.anatomy.model_type}: it has no linear task head.",
                              "Load the model with one, for example AutoModelForImageClassification.")
        path, linear = linears[0]  # the first is what the features enter
        d = linear.in_features
        self.put(build, [Site("features", None, "head", path, d, d, at="input")])

    def params(self, site: Site) -> Params:
        d = site.d_in
        return {name: init for i in range(1, self.layers)
                for name, init in ((f"w{i}", kaiming(d, d)), (f"b{i}", zeros(d)))}

    def forward(self, p: Bound, x: Tensor, y: Tensor) -> Tensor:
        for i in range(1, self.layers):
            x = affine(x, p[f"w{i}"], p[f"b{i}"]).relu()
            if p.training and self.dropout:
                x = F.dropout(x, self.dropout)
        return x
