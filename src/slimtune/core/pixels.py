"""Prompts in front of a tower: a frame of pixels around the image, and channels below its own.

    pad    [T ; [L x R] ; B],  T and B (C, l, W + 2 l), L and R (C, H, l)
    below  patches(x) + W' * P,  P (l, H, W), W' the patch convolution's columns for the new channels
"""
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.anatomy import Tower
from slimtune.core.insert import CHILD, Insert, hook_with, named
from slimtune.core.method import Builder
from slimtune.core.promptsite import PromptSite, masked
from slimtune.errors import MethodError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def put_frame(build: Builder, method: Any, site: PromptSite) -> None:
    """A slot at a tower's input."""
    build.slot(method, site, "frame", method.params(site))
    hook_with(build.module(site.path), _frame, pre=True)


def put_below(build: Builder, method: Any, site: PromptSite, tower: Tower) -> None:
    """A slot at the patch convolution; its own weight and bias are trained."""
    conv = build.module(site.path)
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        raise MethodError(f"{type(method).__name__}(location='below') cannot go on {build.anatomy.model_type}: "
                          f"'{tower.embed}' is no plain convolution.", "Set location='pad'.")
    build.slot(method, site, "below", method.params(site))
    build.own([f"{site.path}.{name}" for name in conv._parameters], "adapter")
    hook_with(conv, _below)


def normalised(pixels: Tensor, rgb: bool) -> Tensor:
    """Pixels of [0, 1] as ImageNet's; channels that are not its three by their mean. Shapes: (..., C, h, w)."""
    mean, std = (pixels.new_tensor(t if rgb else [sum(t) / len(t)])[:, None, None] for t in (MEAN, STD))
    return (pixels - mean) / std


def _frame(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    insert: Insert = tower._modules[CHILD]  # type: ignore[assignment]
    slots = insert.live("frame")
    if not slots:
        return None
    call = named(tower, args, kwargs)
    x: Tensor = call["pixel_values"]
    for slot in slots:
        _check_size(slot, x)
        sides, ends = (masked(slot, t if t.dim() == 4 else t[None], x).expand(x.shape[0], -1, -1, -1)
                       for t in slot.method.frame(slot.bind(x)))
        length = slot.method.length
        x = torch.cat([sides[..., :length], x, sides[..., length:]], -1)
        x = torch.cat([ends[..., :length, :], x, ends[..., length:, :]], -2)
    call["pixel_values"] = x
    if "interpolate_pos_encoding" in inspect.signature(type(tower).forward).parameters:
        call["interpolate_pos_encoding"] = True
    return (), call


def _check_size(slot: Any, x: Tensor) -> None:
    if tuple(x.shape[-2:]) != slot.site.shape:
        raise MethodError(f"{type(slot.method).__name__}: its prompt is for images of {slot.site.shape}, and got "
                          f"{tuple(x.shape[-2:])}.", "Set image_size to the size of the images.")


def _below(conv: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Any:
    """Patches of the new channels are rows of a product, so that an example axis is one like any other."""
    insert: Insert = conv._modules[CHILD]  # type: ignore[assignment]
    for slot in insert.live("below"):
        _check_size(slot, args[0])
        image, weight = slot.method.below(slot.bind(out))
        image = masked(slot, image if image.dim() == 4 else image[None], out)
        columns = F.unfold(image, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
        out = out + (weight.flatten(-3) @ columns).unflatten(-1, out.shape[-2:])
    return out


HOOKS = (_frame, _below)
