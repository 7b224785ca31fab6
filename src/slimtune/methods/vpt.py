"""Visual prompt tuning: trained tokens beside an image's patches, or trained pixels around them.

    [x_i, _, E_i] = Block_i([x_{i-1}, P_{i-1}, E_{i-1}]),    y = Head(LN(x_L))

Deep, each block has a P of its own; shallow, the first block's goes on: [x_i, Z_i, E_i] = Block_i([x_{i-1}, Z_{i-1},
E_{i-1}]). P ~ U(-v, v) with v = sqrt(6 / (3 h w + d)), h x w a patch. Other places for the trained numbers:

    add     Block_i(X + P), with a vector for each token ("add-1": one for all)
    pixel   P is what the patch embedding makes of l trained patches of pixels
    pad     a frame of l trained pixels around the image
    below   l trained channels below the image's, read by new columns of the patch convolution, trained with its own

In Swin every window sees its image's prompt, each stage's of its own width; patch merging and the final mean read the
image alone, so that a shallow prompt ends with the first stage. The paper's code lays prompts out window by window and
mixes those of a batch, repeats them through the merging and has them in the mean: none of that is done here.

Source: Jia et al., 2022, "Visual Prompt Tuning", arXiv 2203.12119, sections 3.2 and 4.3; its code, for the start,
dropout and the ablations.
"""
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slimtune.core import Anatomy, Bound, Builder, Init, Params, Tower, normal, uniform
from slimtune.core.blocktokens import put_added
from slimtune.core.pixels import normalised, put_below, put_frame
from slimtune.core.promptsite import PromptSite, measured
from slimtune.core.prototypes import class_means
from slimtune.core.quiet import hush
from slimtune.core.visual import VisualPrompt
from slimtune.errors import DataError, MethodError

STARTS = {"prepend": ("xavier", "class_inputs", "class_outputs", "class_final"), "add": ("xavier",),
          "add-1": ("xavier",), "pixel": ("xavier", "normal", "imagenet"), "pad": ("imagenet", "normal"),
          "below": ("xavier", "normal", "imagenet")}
"""The starts of each location, the default first."""


class VPT(VisualPrompt):
    """l prompt tokens at every block's input (deep), or at the first's alone.

    Trains L l d numbers deep and l d shallow: 460,800 and 38,400 on ViT-B/16 at l = 50; on Swin-B 12,032 l and 128 l.
    As "add" it trains a token's vector for each of its tokens, l apart; as "pad" 6 l (H + W + 2 l).

    blocks: those that get a prompt of their own: the first k, or as (-k, ..., -1) the last k.
    init: "xavier" is U(-v, v); "class_inputs" the mean class tokens of the classes at each block's input,
    "class_outputs" at its output, "class_final" behind the last block, all three by `calibrate`, with length the
    number of classes; "imagenet" is U(0, 1), used normalised as images are; "normal" is N(0, 1).

    Shapes:
        prompt: (l, d); add: (T, d) or (1, d); pixel: (3, h, w l); with an example axis (B, ...) each.
        pad: ends (3, 2 l, W + 2 l), sides (3, H, 2 l). below: prompt (l, H, W), weight (d, l, h, w).

    Example:
        >>> from slimtune.core import attach
        >>> from slimtune.testing import tiny
        >>> attach(tiny("swin"), VPT(length=2)).count().adapter  # 2 (16 + 16 + 32): each stage has its width
        128
    """

    length: int = Field(50, ge=0, description="l: tokens, pixels of the frame, or channels")
    location: Literal["prepend", "add", "add-1", "pixel", "pad", "below"] = Field(
        "prepend", description="where the trained numbers enter")
    tied: bool = Field(False, description="deep, with one prompt for all blocks")
    project: int | None = Field(None, ge=1, description="width of the prompt, mapped to d by one trained matrix")
    init: Literal["xavier", "normal", "imagenet", "class_inputs", "class_outputs", "class_final"] | None = Field(
        None, description="how the prompt starts; by location by default")
    dropout: float | None = Field(None, ge=0, lt=1, description="of the prompt; 0.1 deep and 0.0 shallow by default")
    image_size: int | None = Field(None, ge=1, description="pixels a side, for pad and below; the model's by default")

    # settings

    @property
    def start(self) -> str:
        """`init`, or the location's own."""
        return self.init or STARTS[self.location][0]

    @property
    def rate(self) -> float:
        return (0.1 if self.deep else 0.0) if self.dropout is None else self.dropout

    def starts_as_identity(self) -> bool:
        return not self.length and not self.location.startswith("add")

    def _check(self, anatomy: Anatomy) -> None:
        """Errors: MethodError for settings that have no meaning together."""
        place, tower = f"location='{self.location}'", self.tower(anatomy)
        by_class, image = self.start.startswith("class"), self.location in ("pad", "below")
        for wrong, what, advice in (
                (self.start not in STARTS[self.location], f"init='{self.init}' is no start for {place}.",
                 f"It has: {' '.join(STARTS[self.location])}"),
                (self.deep and (image or self.location == "pixel"), f"{place} has no deep form.", "Set deep=False."),
                (image and self.blocks is not None, f"{place} is at no block.", "Leave blocks out."),
                (self.tied and (self.location not in ("prepend", "add-1") or not self.deep),
                 f"tied=True is one prompt for all blocks, and with {place}, deep={self.deep} there is none.",
                 "Leave tied out."),
                (self.tied and tower.grid, f"tied=True needs blocks of one width, and {anatomy.model_type}'s "
                 "stages have others.", "Leave tied out."),
                (self.project is not None and (image or self.location == "pixel"), f"{place} has pixels, which "
                 "project does not map.", "Leave project out."),
                (by_class and (self.tied or self.project is not None or not tower.prefix_tokens),
                 f"init='{self.init}' needs a class token, and a prompt of each block's own in its width.",
                 "Set init='xavier'.")):
            if wrong:
                raise MethodError(f"VPT on {anatomy.model_type}: {what}", advice)

    # what it trains

    def where(self, anatomy: Anatomy) -> list[PromptSite]:
        self._check(anatomy)
        if self.location not in ("pad", "below"):
            return super().where(anatomy)
        tower = self.tower(anatomy)
        embed = next(s for s in anatomy.sites if (s.tower, s.role) == (tower.name, "embed"))
        path = tower.path if self.location == "pad" else tower.embed
        return [PromptSite(tower.name, None, "image", path, embed.d_out, embed.d_out, patch=embed.d_in,
                           embed=embed.d_out)]

    def shared(self, sites: Sequence[PromptSite]) -> Params:
        """A prompt for all blocks; a projection into each width, (d, h) and (d)."""
        params: Params = {"prompt": self._prompt(sites[0])} if self.tied else {}
        if (h := self.project) is not None:
            for d in dict.fromkeys(site.d_out for site in sites):
                params |= {f"project_{d}": normal(d, h, std=math.sqrt(2 / d)),
                           f"bias_{d}": uniform(d, bound=1 / math.sqrt(h))}
        return params

    def _fill(self, site: PromptSite, *shape: int) -> Init:
        if self.start == "normal":
            return normal(*shape, std=1.0)
        if self.start == "imagenet":
            return Init(shape, lambda t, g: t.uniform_(generator=g))
        return uniform(*shape, bound=math.sqrt(6 / (site.patch + (self.project or site.embed))))

    def params(self, site: PromptSite) -> Params:
        n, (height, width), (h, w) = self.length, site.shape, site.kernel
        if self.location == "pad":
            return {"ends": self._fill(site, site.channels, 2 * n, width + 2 * n),
                    "sides": self._fill(site, site.channels, height, 2 * n)}
        if self.location == "below":
            xavier = uniform(site.d_out, n, h, w, bound=math.sqrt(6 / (site.patch + site.embed)))
            return {"prompt": self._fill(site, n, height, width), "weight": xavier}
        if self.location == "pixel":
            return {"prompt": self._fill(site, site.channels, h, w * n)}
        return {} if self.tied else {"prompt": self._prompt(site)}

    def _prompt(self, site: PromptSite) -> Init:
        rows = {"add": site.tokens, "add-1": 1}.get(self.location, self.length)
        return self._fill(site, rows, self.project or site.d_out)

    # what it does

    def tokens(self, p: Bound) -> Tensor:
        prompt = p["prompt"]
        if self.location == "pixel":
            image = prompt if prompt.dim() == 4 else prompt[None]
            assert p.host is not None
            return p.host(self._seen(image)).flatten(2).mT
        if self.project is None:
            return prompt
        width = p.site.d_out
        return prompt @ p[f"project_{width}"].mT + p[f"bias_{width}"][..., None, :]

    def frame(self, p: Bound) -> tuple[Tensor, Tensor]:
        """The frame left and right of the image, and above and below. Shapes: see above."""
        return self._seen(p["sides"]), self._seen(p["ends"])

    def below(self, p: Bound) -> tuple[Tensor, Tensor]:
        """The channels below the image's, and the columns of the patch convolution that read them."""
        return self._seen(p["prompt"]), p["weight"]

    def _seen(self, pixels: Tensor) -> Tensor:
        if self.start != "imagenet":
            return pixels
        return normalised(pixels, rgb=pixels.shape[-3] == 3 and self.location != "below")

    def install(self, build: Builder) -> None:
        if self.starts_as_identity():  # no token, no pixel
            return
        if self.location in ("prepend", "pixel"):
            super().install(build)
            return
        tower = self.tower(build.anatomy)
        if self.pool != "original" or self.path == "keys":
            raise MethodError(f"VPT(location='{self.location}') puts no tokens beside the model's own.",
                              "Leave pool and path out.")
        if self.backbone_eval:
            hush(build, self, tower)
        for site in self.where(build.anatomy):
            site = self.fitted(build, site, tower)
            if self.location == "pad":
                put_frame(build, self, site)
            elif self.location == "below":
                put_below(build, self, site, tower)
            else:
                put_added(build, self, site, tower.embed)

    def fitted(self, build: Builder, site: PromptSite, tower: Tower) -> PromptSite:
        if self.location in ("prepend", "add-1"):
            return site
        return measured(build, site, tower, self.image_size, f"VPT(location='{self.location}')")

    # how it starts

    @property
    def needs_data(self) -> bool:
        return self.start.startswith("class")

    @torch.no_grad()
    def calibrate(self, delta: Any, batches: Iterable[dict[str, Any]]) -> None:
        """Start each block's prompt from the mean class tokens of the classes, a token for each."""
        if not self.needs_data:
            return
        with delta.disabled():
            means = class_means(delta.model, self.tower(delta.anatomy), batches)
        if means.shape[1] != self.length:
            raise DataError(f"VPT(init='{self.init}') needs a token for each class: there are {means.shape[1]} "
                            f"classes, and {self.length} tokens.", f"Set length={means.shape[1]}.")
        for _, slot in delta.slots:
            if slot.method is self and "prompt" in slot._parameters:
                level = {"class_inputs": slot.site.block, "class_outputs": slot.site.block + 1}.get(self.start, -1)
                slot._parameters["prompt"].copy_(means[level])
