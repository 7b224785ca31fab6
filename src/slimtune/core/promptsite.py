"""Where a visual prompt comes in, and its rows in one forward."""
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.dropout import draw_seed, seeded_dropout
from slimtune.core.method import Builder
from slimtune.core.sites import Site
from slimtune.core.slot import Slot
from slimtune.errors import MethodError


@dataclass(frozen=True)
class PromptSite(Site):
    """A block's input, or the image in front of a tower.

    part: (a, a), with a the tower's prefix tokens, behind which tokens come in.
    patch, embed: numbers of one patch of pixels, and the width of the patch embedding.
    kernel, shape: heights and widths of a patch and of the image, in pixels; tokens: how many the block sees.
    grid: the block's attention sees windows; onward: what becomes of the tokens behind it is of use.
    """

    patch: int = 0
    embed: int = 0
    kernel: tuple[int, int] = (1, 1)
    shape: tuple[int, int] = (0, 0)
    tokens: int = 0
    grid: bool = False
    onward: bool = False

    @property
    def channels(self) -> int:
        return self.patch // math.prod(self.kernel)


def measured(build: Builder, site: PromptSite, tower: Tower, image_size: int | None, who: str) -> PromptSite:
    """The site with what the patch embedding and the configuration tell.

    Errors: MethodError when the patch embedding is no convolution, or the size of the images is not known.
    """
    conv: Any = build.module(tower.embed)
    size = image_size or getattr(getattr(build.module(tower.path), "config", None), "image_size", None)
    if not isinstance(conv, nn.Conv2d) or size is None:
        raise MethodError(f"{who} cannot go on {build.anatomy.model_type}: "
                          + ("its configuration has no image_size." if size is None
                             else f"'{tower.embed}' is no convolution of pixels."),
                          "Set image_size." if size is None else "Set location='prepend'.")
    shape = (size, size) if isinstance(size, int) else tuple(size)
    kernel = conv.kernel_size
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(shape, kernel, conv.stride, strict=True))
    if tower.grid:  # the image is filled up to whole patches, and each stage halves the grid
        stage = round(math.log2(max(site.d_out, 1) / conv.out_channels))
        rows, columns = (-(-n // (k * 2**stage)) for n, k in zip(shape, kernel, strict=True))
    return replace(site, kernel=kernel, shape=shape, tokens=tower.prefix_tokens + rows * columns)  # type: ignore[arg-type]


def in_windows(slot: Slot) -> bool:
    """Whether the slot's block sees windows: the first axis of what it reads is then no example axis."""
    return isinstance(slot.site, PromptSite) and slot.site.grid


def rows(slot: Slot, x: Tensor) -> Tensor:
    """A slot's prompt beside x, (B, ...): (B, l, d), or (1, l, d) where all examples share it.

    The slot's first `relative` module is the patch embedding.
    """
    p = slot.method.tokens(slot.bind(x, slot.relative[0]))
    return masked(slot, p if p.dim() == 3 else p[None], x)


def masked(slot: Slot, p: Tensor, x: Tensor) -> Tensor:
    """A prompt with dropout, in training: a mask for each example, or one for all where x has windows.

    Shapes: p (1, ...) or (B, ...); x (B, ...).
    """
    rate = slot.method.rate
    if not (slot.training and rate):
        return p
    return seeded_dropout(p if in_windows(slot) else p.expand(x.shape[0], *p.shape[1:]), rate, draw_seed())
