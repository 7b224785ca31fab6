"""A block's prompt as extra keys and values: exact where what becomes of the prompt behind the block is of no use.

    softmax(q [W_k LN(P) ; k]^T) [W_v LN(P) ; v],    q of the model's own tokens alone

The rows of P have no queries and no feed-forward network, which is what they cost as tokens. The block's own norm and
projections run on P, with whatever other methods have put on them.
"""
from dataclasses import replace
from typing import Any

from torch import nn

from slimtune.core.insert import CHILD, Insert, first, hook_with
from slimtune.core.keyvalues import check_wraps, wrap
from slimtune.core.method import Builder
from slimtune.core.promptsite import PromptSite, in_windows, rows
from slimtune.core.sites import Site
from slimtune.errors import MethodError


def block_sites(build: Builder, site: Site) -> dict[str, Site]:
    """The sites of a block by role."""
    return {s.role: s for s in build.anatomy.sites if (s.tower, s.block, s.cross) == (site.tower, site.block, False)}


def check_keys(build: Builder, method: Any, site: PromptSite) -> None:
    """Errors: MethodError where a prompt cannot go as keys and values."""
    own = block_sites(build, site)
    if build.anatomy.guessed or own["attn.k"].part is not None or "norm.attn" not in own:
        raise MethodError(f"{type(method).__name__}(path='keys') cannot go on {build.anatomy.model_type}: what stands "
                          "between a block's input and its attention is not known.", "Set path='tokens'.")
    check_wraps(method, build.module(str(own["attn"].attention)), own["attn"])


def put_keys(build: Builder, method: Any, site: PromptSite, embed: str) -> None:
    """A slot at a block's attention."""
    own = block_sites(build, site)
    attention = build.module(str(own["attn"].attention))
    site = replace(site, path=str(own["attn"].attention), attention=own["attn"].attention, heads=own["attn"].heads,
                   head_dim=own["attn"].head_dim)
    slot = build.slot(method, site, "kv", method.params(site))
    paths = (embed, own["norm.attn"].path, own["attn.k"].path, own["attn.v"].path)
    slot.relative = tuple(build.module(path) for path in paths)
    wrap(attention)
    # in front of the model's own keys and values: what other methods read of those is then theirs again
    hook_with(attention, _make, pre=True)


def _make(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    insert: Insert = attention._modules[CHILD]  # type: ignore[assignment]
    for number, slot in enumerate(insert.live("kv")):
        if not isinstance(slot.site, PromptSite):  # another method's keys and values
            continue
        _, norm, k, v = slot.relative
        x = first(args, kwargs)
        p = rows(slot, x)
        if not in_windows(slot) and any(CHILD in m._modules for m in (norm, k, v)):
            p = p.expand(x.shape[0], -1, -1)  # what stands there may differ from example to example
        p = norm(p)
        insert.plan.put(f"pair/{number}", (k(p), v(p)))


HOOKS = (_make,)
