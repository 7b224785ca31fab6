"""What is read from a folder before it is attached: methods with their values, and a ledger of the file's tensors."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimtune.core.method import Method, from_config, key_of
from slimtune.errors import DeltaError, listing, suggest
from slimtune.io.adapterhub_names import Hub, parse_key
from slimtune.io.delta_folder import NOTHING

SHARED = "shared"


@dataclass
class Read:
    """One method and its values: (site's name, or SHARED) and parameter -> value."""

    method: Method
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def read_as(config: Mapping[str, Any]) -> Read:
    """An empty part of a method. Head and norms are not in an adapter's file."""
    return Read(from_config({"head": "none", "norms": "none", **config}))


def assemble(reads: Sequence[Read]) -> tuple[list[Method], dict[str, Tensor]]:
    """Methods and state for `attach`, which numbers methods of one kind."""
    keys: list[str] = []
    state: dict[str, Tensor] = {}
    for read in reads:
        kind = key_of(type(read.method))
        key = kind if kind not in keys else f"{kind}_{keys.count(kind) + 1}"
        keys.append(kind)
        for (site, name), value in read.values.items():
            state[f"shared.{key}.{name}" if site == SHARED else f"{site}.{key}.{name}"] = value
    return [read.method for read in reads], state


class Ledger:
    """A file's tensors, each to be taken; what is missing, left over or of another shape is an error.

    The library writes some tensors twice (a prefix under every layer); copies must be equal, and count once.
    """

    def __init__(self, tensors: Mapping[str, Tensor], hub: Hub, name: str, where: str) -> None:
        self.where = where
        self.names: dict[str, str] = {}
        self.values: dict[str, Tensor] = {}
        self.used: set[str] = set()
        for key, value in tensors.items():
            path = parse_key(key, hub, name, where)
            if ".pool.prefix_tunings." in path:
                path = "prefix_tuning.prefix_tunings." + path.partition(".pool.prefix_tunings.")[2]
            if path in self.values and not torch.equal(self.values[path], value):
                raise DeltaError(f"{where}: {key!r} and {self.names[path]!r} are one tensor, and differ.", NOTHING)
            self.names[path], self.values[path] = key, value

    def take(self, path: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor at a path. Errors: DeltaError when it is not there, or has another shape."""
        if path not in self.values:
            raise DeltaError(f"{self.where}: there is no tensor for {path}.", suggest(path, self.values),
                             f"There are: {listing(self.names.values(), 4) or 'none'}.", NOTHING)
        if path in self.used and not path.startswith("shared_parameters"):
            raise DeltaError(f"{self.where}: two parts of the union name {path}.", NOTHING)
        value = self.values[path]
        if tuple(value.shape) != shape:
            raise DeltaError(f"{self.where}: {self.names[path]} has shape {tuple(value.shape)}, and should have "
                             f"{shape}.", "Load the model it was trained on. " + NOTHING)
        self.used.add(path)
        return value

    def same(self, path: str, value: Tensor) -> None:
        """A second copy, which may be there. Errors: DeltaError when it differs."""
        if path in self.values and not torch.equal(self.take(path, tuple(value.shape)), value):
            raise DeltaError(f"{self.where}: {self.names[path]} is not equal to its other copy.", NOTHING)

    def finish(self) -> None:
        """Errors: DeltaError for a tensor that nothing took."""
        for path, key in self.names.items():
            if path not in self.used:
                raise DeltaError(f"{self.where}: {key} belongs to nothing that the config names on this model.",
                                 "The config may leave out a layer or module that the file has.", NOTHING)
