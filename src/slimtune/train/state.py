"""The numbers of a delta, an optimizer, a scheduler and the random generators, as tensors and JSON, and back."""
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.bits import pack
from slimtune.core.delta import Delta
from slimtune.core.mask import PREFIX, split_masks
from slimtune.core.store import describe
from slimtune.errors import DeltaError, TrainError, listing
from slimtune.train.checkpoint import Checkpoint

BESIDE = "beside."
"""Before the name of what a run keeps beside the delta, among the delta's tensors in a checkpoint."""


def adamw(delta: Delta, *, lr: float, head_lr: float | None = None, weight_decay: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over the delta's trained tensors alone, fused where the device has it.

    Tensors with two or more axes decay; the head may have its own learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in delta.named_parameters():
        rate = head_lr if head_lr is not None and name.startswith("head.") else lr
        groups.setdefault((rate, weight_decay if p.dim() > 1 else 0.0), []).append(p)
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for ps in groups.values() for p in ps)
    return torch.optim.AdamW([{"params": ps, "lr": rate, "weight_decay": decay}
                              for (rate, decay), ps in groups.items()], lr=lr, betas=betas, eps=eps, fused=fused)


def delta_state(delta: Delta) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(the delta's tensors and the bits of its masks, the shape of each mask), as a checkpoint holds them."""
    bits = {PREFIX + name: pack(mask) for name, mask in delta.masks.items()}
    return delta.state() | bits, {name: list(mask.shape) for name, mask in delta.masks.items()}


def load_delta_state(delta: Delta, checkpoint: Checkpoint) -> None:
    """Set the delta to a checkpoint's values. Errors: DeltaError when it is of another method or base."""
    values, masks = split_masks(checkpoint.delta, checkpoint.facts.get("masks") or {})
    masked = bool(masks or delta.masks)
    counts = [("counts", "has other counts")] if not masked else []  # a mask that grows changes them
    told, own = checkpoint.facts["delta"], json.loads(json.dumps(describe(delta, delta.methods)))
    for part, words in (("methods", "was trained with another method"), ("model_type", "is for another backbone"),
                        ("base", "is for another backbone"), *counts):
        if told.get(part) != own[part]:
            raise DeltaError(f"checkpoint-{checkpoint.step}: {words}.", f"It says {part} {told.get(part)},",
                             f"and this run has {own[part]}.", "Resume with the model and method it was begun with.")
    if masked:
        delta.set_masks(masks)
        delta.info.pop("sparsity", None)  # of steps behind the checkpoint
        delta.info |= {key: value for key, value in told.get("info", {}).items() if key == "sparsity"}
    delta.load_state({name: value for name, value in values.items() if not name.startswith(BESIDE)})


def optimizer_state(delta: Delta, optimizer: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors by `<name>/<state>`, groups with names of tensors and plain numbers).

    Errors: TrainError when the optimizer holds what is not the delta's, or a state that is no tensor or number.
    """
    names = {id(p): name for name, p in delta.named_parameters()}
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise TrainError("the optimizer holds tensors that are not the delta's; they would not be saved.",
                             "Make it from delta.parameters().")
        held: dict[str, Any] = {}
        for p in group["params"]:
            numbers: dict[str, Any] = {}
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{names[id(p)]}/{key}"] = value
                else:
                    numbers[key] = _plain(value, f"optimizer state {key}")
            held[names[id(p)]] = numbers
        settings = {k: _plain(v, f"optimizer setting {k}") for k, v in group.items() if k != "params"}
        groups.append({"names": list(held), "numbers": held, "settings": settings})
    return tensors, groups


def load_optimizer_state(delta: Delta, optimizer: Any, tensors: Mapping[str, Tensor],
                         groups: list[dict[str, Any]]) -> None:
    """Set what `optimizer_state` gave. Errors: DeltaError when the groups hold other tensors."""
    names = {id(p): name for name, p in delta.named_parameters()}
    own = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if own != [group["names"] for group in groups]:
        raise DeltaError("the optimizer's groups of tensors are not those of the checkpoint.",
                         "Resume with the method and the learning rates that the run was begun with.")
    optimizer.state.clear()
    values: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        values.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = tensor
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for p, name in zip(group["params"], saved["names"], strict=True):
            found = values.pop(name, {})
            state = {key: _like(value, p) for key, value in found.items()} | saved["numbers"][name]
            if state:
                optimizer.state[p] = state
        group.update({key: tuple(value) if isinstance(value, list) else value
                      for key, value in saved["settings"].items()})
    if values:
        raise DeltaError(f"the checkpoint's optimizer state has {listing(sorted(values), 6)}, which nothing uses.")


def _like(value: Tensor, p: nn.Parameter) -> Tensor:
    """The value with the parameter's device and strides; a count of steps stays where fused kernels want it."""
    if value.shape == p.shape and value.dim():
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.clone() if p.device.type == "cpu" else value.to(p.device)


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item, what) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, what) for key, item in value.items()}
    raise TrainError(f"{what} is a {type(value).__name__}, which a checkpoint cannot hold.",
                     "It takes tensors, numbers and text.")


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's numbers; its functions are made anew."""
    return {key: _plain(value, f"scheduler {key}") for key, value in scheduler.state_dict().items()
            if key != "lr_lambdas"}


def load_scheduler_state(scheduler: Any, numbers: Mapping[str, Any]) -> None:
    """Set what `scheduler_state` gave."""
    current = scheduler.state_dict()
    if set(numbers) != set(current) - {"lr_lambdas"}:
        raise DeltaError("the checkpoint's scheduler is of another kind.",
                         "Resume with the schedule that the run was begun with.")
    scheduler.load_state_dict({**current, **numbers})


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of Python's, NumPy's and torch's generators: (tensors, numbers)."""
    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"python": torch.tensor(words, dtype=torch.int64), "torch": torch.get_rng_state(),
               "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, gauss], "numpy": [str(kind), int(position), int(has_gauss), float(cached)]}


def set_rng_state(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Set what `rng_state` gave."""
    import numpy as np

    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    states = [tensors[f"cuda.{i}"] for i in range(len(tensors)) if f"cuda.{i}" in tensors]
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[:torch.cuda.device_count()])


@contextmanager
def kept_rng() -> Iterator[None]:
    """Whatever is drawn inside, the generators are given back as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(*state)
