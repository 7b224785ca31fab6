"""Filling the feature cache: one pass over the examples before the first step.

Each example runs alone or among others of its very shape, so that no state depends on padding, on the order of the
data or on the batch. The training loop then never runs the frozen blocks, at the first epoch as at the last, and a
killed run reads the same bits when it goes on.
"""
import hashlib
import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slimtune.core.cut import cut
from slimtune.core.delta import Delta
from slimtune.core.insert import CHILD
from slimtune.core.replay import Cut, states
from slimtune.core.unfreeze import base_parameters
from slimtune.data.examples import Collate
from slimtune.errors import DataError, TrainError
from slimtune.train.featurefile import FeatureFile, Filling, States, discard
from slimtune.train.features import INDEX, Features, Numbered, numbered
from slimtune.train.guard import Interrupted
from slimtune.train.predict import autocast, on_device
from slimtune.train.signals import Signals
from slimtune.train.spec import TrainSpec
from slimtune.train.survey import joined, survey

log = logging.getLogger("slimtune")
FOLDER = "features"
"""The cache in a run's folder, where train.cache names none."""
Batch = Callable[[Sequence[int]], dict[str, Any]]
Report = Callable[[dict[str, Any]], None]


def open_features(delta: Delta, data: Any, collate: Collate, spec: TrainSpec, folder: Path, signals: Signals,
                  report: Report | None = None) -> Features:
    """The cache of a run, filled first if need be, and checked against the model.

    In the run's own folder a cache of something else, or a damaged one, is filled anew; in a folder that
    train.cache names it is refused. Errors: MethodError when nothing of the model is frozen for this delta;
    DataError for a cache that does not fit; TrainError for a disk without room; Interrupted.
    """
    def batch(examples: Sequence[int]) -> dict[str, Any]:
        return on_device(numbered(collate)(Numbered(data).__getitems__(examples)), delta.model)

    with autocast(delta.model, spec.precision):
        found = survey(data, collate)
        longest = found.order()[0]
        at = cut(delta, _plain(batch([longest])))
        kept = {name: (width, torch.bfloat16 if spec.cache_dtype == "bfloat16" else at.dtypes[name])
                for name, width in at.widths.items()}
        path, key = _path(spec, folder), _key(delta, found.digest, spec)
        file = _found(path, key, kept, own=spec.cache is True)
        if file is None:
            one = states(delta, at, _plain(batch([longest])))
            bytes_ = sum(one[name].shape[1] * width * dtype.itemsize for name, (width, dtype) in kept.items())
            sizes = [found.size(i) for i in range(len(data))]
            filling = Filling(path, key, kept, len(data))
            with filling.opened():
                _check_room(filling, bytes_ * sum(sizes) // sizes[longest])
                _fill(delta, at, filling, found.batches(spec.batch_size), batch, signals, report)
            file = FeatureFile(path, key, kept)
        features = Features(delta, at, file)
        features.check(batch(found.spread(8)), rough=spec.precision != "float32")
    return features


def remove_own(spec: TrainSpec, folder: Path) -> None:
    """Delete the cache of a run that is over, where it stands in the run's folder: nothing reads it any more.

    One that cannot be deleted is told of, and fails no finished run.
    """
    if spec.cache is True:
        try:
            discard(_path(spec, folder))
        except (DataError, OSError) as error:
            log.warning("%s: the feature cache was not deleted: %s", _path(spec, folder), error)


def _path(spec: TrainSpec, folder: Path) -> Path:
    return folder / FOLDER if spec.cache is True else Path(str(spec.cache)).expanduser()


def _plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != INDEX}


def _key(delta: Delta, data: str, spec: TrainSpec) -> dict[str, str]:
    """What states depend on: every bit of the backbone (the head apart), its config, the examples, the versions."""
    model: Any = delta.model
    buffers = {name: b for name, b in model.named_buffers() if CHILD not in name.split(".")}
    with delta.disabled():
        base = joined({**base_parameters(model), **buffers}, leave=[f"{head}." for head in delta.anatomy.heads])
    config = getattr(model, "config", None)
    told = {k: v for k, v in (config.to_dict() if config is not None else {}).items()
            if k not in ("_name_or_path", "use_cache")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    return {"base": base, "config": digest, "data": data, "precision": spec.precision, "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers")}


def _found(path: Path, key: Mapping[str, str], kept: States, own: bool) -> FeatureFile | None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        file = FeatureFile(path, key, kept)
    except DataError as error:
        if not own:
            raise
        log.warning("%s It is filled anew.", error.what)
        discard(path)
        return None
    log.info("feature cache: read from %s", path)
    return file


def _fill(delta: Delta, at: Cut, filling: Filling, batches: Iterator[list[int]], batch: Batch, signals: Signals,
          report: Report | None) -> None:
    start, done, examples = time.monotonic(), 0, filling.facts["examples"]
    for numbers in batches:
        fresh = [i for i in numbers if not filling.has(i)]
        if fresh:
            filling.add(fresh, states(delta, at, _plain(batch(fresh))))
        done += len(numbers)
        if report is not None:
            report({"event": "fill", "step": done, "steps": examples})
        if signals.told:
            filling.save()
            raise Interrupted(f"interrupted by {signals.told} while the feature cache was filled: {done} of "
                              f"{examples} examples.", "Run it again to go on from there.")
    filling.finish()
    log.info("feature cache: filled in %.0f s", time.monotonic() - start)


def _check_room(filling: Filling, needed: int) -> None:
    there, free = sum(path.stat().st_size for path in filling.part.iterdir()), shutil.disk_usage(filling.part).free
    log.info("feature cache: about %s at %s", _size(needed), filling.folder)
    if needed - there > free:
        raise TrainError(f"{filling.folder}: the feature cache needs about {_size(needed)}, and the disk has "
                         f"{_size(free)} free.",
                         "Choose another disk (train.cache=FOLDER), halve it (train.cache_dtype=bfloat16), or train "
                         "without train.cache.")


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e3:.1f} kB"
