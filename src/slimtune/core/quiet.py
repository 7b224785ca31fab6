"""The backbone in eval mode while its prompts train: no dropout, no stochastic depth, batch norms as they are.

Modules that differ between the modes run in eval mode, one at a time, so that `model.train()`, gradient checkpointing
and its recomputation stay as they are.
"""
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimtune.core.anatomy import Tower
from slimtune.core.insert import CHILD, Insert, hook_with
from slimtune.core.method import Builder, Method
from slimtune.core.sites import Site, join


def hush(build: Builder, method: Method, tower: Tower) -> None:
    """Let a tower's random modules be quiet while the method is active."""
    for path, module in list(build.module(tower.path).named_modules()):
        if CHILD in path.split(".") or not _differs(module):
            continue
        build.slot(method, Site(tower.name, None, "quiet", join(tower.path, path), 0, 0), "quiet", {})
        hook_with(module, _quiet, pre=True)
        if _loud not in module._forward_hooks.values():
            module.register_forward_hook(_loud, with_kwargs=True, always_call=True)


def _differs(module: nn.Module) -> bool:
    """Whether a module does something else in training; attentions drop by their own flag."""
    if isinstance(module, _BatchNorm):
        return True
    if hasattr(module, "gradient_checkpointing"):  # it is checkpointed in training mode only
        return False
    rates = [v for n, v in vars(module).items() if n in ("p", "prob") or "drop" in n]
    rates += [child.p for child in module.children() if isinstance(child, nn.Dropout)]  # an attention reads it there
    return any(isinstance(v, float) and v > 0 for v in rates)


def _quiet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    insert: Insert = module._modules[CHILD]  # type: ignore[assignment]
    if module.training and insert.live("quiet"):
        insert.plan.put(f"quiet/{id(module)}", True)
        module.training = False


def _loud(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Runs when the module raised as well."""
    insert: Insert = module._modules[CHILD]  # type: ignore[assignment]
    if insert.plan.take(f"quiet/{id(module)}", False):
        module.training = True


HOOKS = (_quiet, _loud)
