"""VisualPrompt: tokens beside those of a vision tower, each block's own (deep) or one set that goes on (shallow).

    deep     [x_i, _, E_i] = Block_i([x_{i-1}, P_{i-1}, E_{i-1}])
    shallow  [x_1, Z_1, E_1] = Block_1([x_0, P, E_0]);   [x_i, Z_i, E_i] = Block_i([x_{i-1}, Z_{i-1}, E_{i-1}])

A block's prompt goes as tokens (blocktokens.py, or windows.py for Swin) or, where what becomes of it is of no use, as
keys and values (promptkeys.py): the model's own tokens are the same.
"""
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from slimtune.core.anatomy import Anatomy, Tower
from slimtune.core.blocktokens import hook_leave, hook_stream, put_tokens
from slimtune.core.bound import Bound
from slimtune.core.init import Params
from slimtune.core.method import Builder, Method
from slimtune.core.promptkeys import check_keys, put_keys
from slimtune.core.promptsite import PromptSite
from slimtune.core.quiet import hush
from slimtune.core.tokenbias import widen_biases
from slimtune.core.windows import put_windows
from slimtune.errors import MethodError, listing


class VisualPrompt(Method):
    """The primitive of visual prompts. A subclass states `params` (and `shared`), `tokens` and `rate`.

    deep: each of the blocks has its own prompt, or the first of them one that goes on through all behind it.
    carry: behind the last block that has a prompt of its own, what became of it goes on; else it is taken off.
    path: how a block's prompt goes; "auto" takes keys and values where they give the same.
    pool: what the head reads: the class token, or a mean behind the final norm, put in the class token's place.
    strip: the tokens are taken off behind the last block, so that no pooling of the model's own reads them.
    backbone_eval: the tower's own dropout and stochastic depth are off while the prompt trains.

    In `output_hidden_states`, those between the blocks hold a prompt that goes as tokens; keys and values leave no
    trace there, and one more column for each in attention maps.
    """

    primitive: ClassVar[str] = "tokens"
    identity: ClassVar[bool] = False
    composition: ClassVar[str] = "concat"

    deep: bool = Field(True, description="a prompt for each block, or one at the first that goes on")
    carry: bool = Field(True, description="what became of a prompt goes on through blocks without one")
    path: Literal["auto", "tokens", "keys"] = Field("auto", description="as tokens, or as keys and values")
    pool: Literal["original", "image", "prompt", "image+prompt"] = Field("original", description="what the head reads")
    strip: bool = Field(True, description="take the tokens off behind the last block")
    backbone_eval: bool = Field(True, description="the tower's own dropout is off while the prompt trains")

    # what a subclass states

    def params(self, site: PromptSite) -> Params:
        """What it trains at one block."""
        raise NotImplementedError

    def tokens(self, p: Bound) -> Tensor:
        """The prompt before dropout; p.host is the patch embedding. Shapes: (..., length, width)."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Dropout of the prompt."""
        return 0.0

    def fitted(self, build: Builder, site: PromptSite, tower: Tower) -> PromptSite:
        """The site with what `params` reads of the model's modules."""
        return site

    # where it goes

    def tower(self, anatomy: Anatomy) -> Tower:
        """The vision tower. Errors: MethodError without one."""
        found = next((t for t in anatomy.towers if t.name == "vision"), None)
        if found is None:
            raise MethodError(f"{type(self).__name__} cannot go on {anatomy.model_type}: it has no vision tower.",
                              f"It has: {listing(t.name for t in anatomy.towers)}",
                              "Pass anatomy=slimtune.dissect(model, towers=[TowerSpec('vision', ...)]) to say which is."
                              if anatomy.guessed else "Use PromptTuning, or PTuningV2.")
        return found

    def where(self, anatomy: Anatomy) -> list[Any]:
        """The blocks whose input gets a prompt of its own."""
        tower = self.tower(anatomy)
        if not any(s.tower == tower.name and s.role == "attn" for s in anatomy.sites):
            raise MethodError(f"{type(self).__name__} cannot go on {anatomy.model_type}: it has no attention, which "
                              "tokens need.", "Set location='pad', deep=False: pixels around the image.")
        embed = next(s for s in anatomy.sites if (s.tower, s.role) == (tower.name, "embed"))
        at = (tower.prefix_tokens, tower.prefix_tokens)
        found = anatomy.select(("vision.block",), self.blocks, who=f"method {type(self).__name__}")
        return [PromptSite(s.tower, s.block, "tokens", s.path, s.d_in, s.d_out, part=at, patch=embed.d_in,
                           embed=embed.d_out, grid=tower.grid) for s in (found if self.deep else found[:1])]

    def install(self, build: Builder) -> None:
        tower = self.tower(build.anatomy)
        self._check_end(build.anatomy, tower)
        if self.backbone_eval:
            hush(build, self, tower)
        steps = list(self._steps(build, tower))
        if "prompt" in self.pool and steps[-1][1] not in ("tokens", "kept"):
            raise MethodError(f"{type(self).__name__}(pool='{self.pool}') has no prompt to read: none is left behind "
                              "the last block.", "Leave carry=True, give the last block a prompt, or set pool='image'.")
        for site, how in steps:
            site = self.fitted(build, site, tower)
            put = put_keys if how == "keys" else put_windows if tower.grid else put_tokens
            put(build, self, site, tower.embed)
        if tower.grid:
            return
        if any(how != "keys" for _, how in steps):
            hook_stream(build, self, tower)
            widen_biases(build, self, tower)
        if self.pool != "original":
            hook_leave(build, self, tower, tower.final)
        elif self.strip and steps[-1][1] in ("tokens", "kept"):
            hook_leave(build, self, tower, tower.blocks[-1])

    def _check_end(self, anatomy: Anatomy, tower: Tower) -> None:
        name, family = type(self).__name__, anatomy.model_type
        if self.pool != "original" and not tower.pools:
            raise MethodError(f"{name}(pool='{self.pool}') cannot go on {family}: its head reads more than the class "
                              "token behind the final norm.", "Set pool='original'.")
        if not self.strip and tower.grid:
            raise MethodError(f"{name}(strip=False) cannot go on {family}: a prompt ends with the stage of its blocks.",
                              "Leave strip=True.")

    def _steps(self, build: Builder, tower: Tower) -> Iterator[tuple[PromptSite, str]]:
        """For each block that a prompt touches: how. "tokens": its own; "kept": from the block before; "ended"."""
        own: dict[int, PromptSite] = {s.block: s for s in self.where(build.anatomy)}
        here = False
        for i, path in enumerate(tower.blocks):
            here = here and not _begins(tower, i)
            onward = self.carry and i + 1 not in own and not _begins(tower, i + 1)
            last = i + 1 == len(tower.blocks) and (not self.strip or "prompt" in self.pool)
            if i in own:
                site = replace(own[i], onward=onward)
                if self._by_keys(build, site, onward or last):
                    if here:
                        yield replace(site, role="ended"), "ended"
                    yield site, "keys"
                    here = False
                else:
                    yield site, "tokens"
                    here = True
            elif here:
                block = next(s for s in build.anatomy.sites if s.path == path and s.role == "block")
                how = "kept" if self.carry else "ended"
                at = PromptSite(block.tower, i, how, path, block.d_in, block.d_out,
                                part=(tower.prefix_tokens, tower.prefix_tokens), onward=onward)
                yield at, how
                here = self.carry

    def _by_keys(self, build: Builder, site: PromptSite, needed: bool) -> bool:
        if self.path == "tokens" or (self.path == "auto" and needed):
            return False
        if needed:
            raise MethodError(f"{type(self).__name__}(path='keys') keeps nothing of a prompt behind its block, and "
                              f"what becomes of block {site.block}'s goes on.", "Set path='auto', or carry=False.")
        try:
            check_keys(build, self, site)
        except MethodError:
            if self.path == "keys":
                raise
            return False
        return True


def _begins(tower: Tower, i: int) -> bool:
    """Whether no token reaches block i from the one before: it is the first, past the last, or in another stage."""
    if i in (0, len(tower.blocks)):
        return True
    return tower.grid and tower.blocks[i].rpartition(".")[0] != tower.blocks[i - 1].rpartition(".")[0]

