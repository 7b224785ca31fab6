"""Partial-k: the last k blocks, the final norm and the head.

    theta_i <- theta_i + d_i,    i in the blocks N - k, ..., N - 1 and the norm behind them

Source: the baseline of Jia et al., 2022, "Visual Prompt Tuning", arXiv 2203.12119, section 4 (Partial-k); Yosinski
et al., 2014, arXiv 1411.1792. The final norm is trained by the official code of the former.
"""
from typing import ClassVar

from pydantic import Field

from slimtune.core import Builder, Tower, Unfreeze, base_parameters
from slimtune.errors import MethodError, SiteError, listing


class PartialK(Unfreeze):
    """What is below the last k blocks keeps no graph, and can be cached.

    Trains k (4 d^2 + 2 d f + 9 d + f) + 2 d numbers: 7,089,408 on ViT-B/16 at k = 1, the final norm's 1,536 among
    them. A tower whose norms follow the residual sums (BERT) has no final norm.

    Errors: SiteError for a tower that does not exist; MethodError for more blocks than there are.
    """

    k: int = Field(1, ge=1, description="blocks trained, from the end of each tower")
    final_norm: bool = Field(True, description="train the norm behind the last block")
    towers: tuple[str, ...] | None = Field(None, description="towers it goes on; all by default")

    silent: ClassVar[dict[str, str]] = {
        r"(key|k_proj|k_lin|key_proj|attn\.k)\.bias$": "softmax ignores a shift of all keys by one vector"}

    def tensors(self, build: Builder) -> list[str]:
        anatomy, parameters = build.anatomy, base_parameters(build.model)
        names = [tower.name for tower in anatomy.towers]
        if self.blocks is not None:
            raise MethodError("PartialK takes the last blocks of each tower.", "Set method.k instead of blocks.")
        for name in self.towers or ():
            if name not in names:
                raise SiteError(f"method PartialK asked for tower '{name}', which {anatomy.model_type} does not have.",
                                f"It has: {listing(names)}", "Set method.towers.")
        owners = [path for name in self.towers or names for path in self._owners(anatomy.tower(name), build)]
        return [path for path in parameters if path.startswith(tuple(f"{owner}." for owner in owners))]

    def _owners(self, tower: Tower, build: Builder) -> list[str]:
        """The modules of one tower that are trained whole."""
        if self.k > len(tower.blocks):
            raise MethodError(f"PartialK.k={self.k} is more than the {tower.name} has blocks.",
                              f"It has: {len(tower.blocks)}.")
        norms = [s.path for s in build.anatomy.sites if s.tower == tower.name and s.role == "norm.final"]
        return [*tower.blocks[-self.k:], *(norms if self.final_norm else ())]
