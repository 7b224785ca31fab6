"""fit: train a delta on examples, in a folder that a killed run can be resumed from."""
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from slimtune.core.delta import Delta
from slimtune.data.examples import Collate
from slimtune.errors import DataError, DeltaError, RecipeError, TrainError, listing
from slimtune.objectives.distillation import Objective
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.spec import PrivacySpec
from slimtune.train.assemble import make_trainer
from slimtune.train.checkpoint import checkpoints, last_checkpoint, prune, read_checkpoint, remove, step_of, tidy
from slimtune.train.fill import open_features, remove_own
from slimtune.train.guard import Interrupted
from slimtune.train.journal import Journal
from slimtune.train.memory import PeakMemory
from slimtune.train.predict import Score, Step, evaluate, logits, on_device
from slimtune.train.prunespec import PruneSpec
from slimtune.train.pruning import check_pruning, open_pruner
from slimtune.train.signals import Signals
from slimtune.train.spec import TrainSpec, more_is_better, private_spec
from slimtune.train.surroundings import surroundings

log = logging.getLogger("slimtune")
Report = Callable[[dict[str, Any]], None]
FREE = ("threads", "keep", "save_every", "eval_every", "eval_batch_size", "log_every", "patience")
"""What may differ when a run is resumed: it changes no number that is trained."""
CALIBRATION = 1024
"""Examples for a start that needs data."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    steps: optimizer steps in all; epochs: passes over the data; seconds: of this call, evaluation included.
    peak_memory_mb: highest resident memory during the run, MiB; added_memory_mb: above that at its start.
    metrics: those of the validation data for the delta as it is now: the best, or the last.
    best: the checkpoint that was chosen, if `best` was asked for. resumed_from: where this call began.
    privacy: what a private run has spent (see `slimtune.privacy.Ledger.report`), which delta.info holds too.
    history: the lines of metrics.jsonl.
    """

    steps: int
    epochs: float
    seconds: float
    peak_memory_mb: float
    added_memory_mb: float
    metrics: dict[str, float]
    best: Path | None
    resumed_from: Path | None
    stopped_early: bool
    history: list[dict[str, Any]] = field(repr=False)
    privacy: dict[str, Any] | None = None


def fit(delta: Delta, train_data: Any, validation_data: Any | None, collate: Collate, metric_fn: Score | None,
        spec: TrainSpec, folder: Path | str, *, resume: Literal["auto", False] | Path | str = "auto",
        report: Report | None = None, step: Step = logits, privacy: PrivacySpec | None = None,
        pruning: PruneSpec | None = None, objective: Objective | None = None) -> TrainResult:
    """Train the delta, in place, and leave it at its best or last step; the model is left in its mode.

    The folder gets checkpoint-<step> folders and metrics.jsonl. The same delta, data and spec give the same
    bits in any process, and so does a run that was stopped at any moment and resumed, provided that `collate`
    draws no random numbers.

    resume: "auto" goes on from the newest checkpoint that verifies, if there is one; False starts over and
    deletes the checkpoints in the folder; a path goes on from that checkpoint and deletes later ones.
    report: is called with {"event": "start" | "step" | "log" | "evaluate" | "save", "step": ..., "steps": ...}, and
    with "fill" for examples of a feature cache.
    step: how predictions are made for metric_fn; see `slimtune.train.predict`.
    privacy: trains with differential privacy of train_data (see private.py); steps are then Poisson draws of
    privacy.batch_size examples, run spec.batch_size at a time.
    objective: of (inputs, outputs, task loss), what is minimised, such as a `Teacher` (see distillation.py).
    pruning: prunes before the first step, or while it trains (see pruning.py); delta.info["sparsity"] says to what.

    With spec.cache the frozen part runs once for each example, before the first step (see fill.py), in eval mode;
    dropout of the head, of a side network and of blocks that train is as ever.

    Errors: TrainError for a run that fails, Interrupted (exit code 3) for one that was told to stop and can
    be resumed, RecipeError for a spec that the folder's run was not begun with, DataError for no examples.

    Example:
        >>> result = fit(delta, train, validation, collate, metric_fn, TrainSpec(), "run")  # doctest: +SKIP
        >>> result.metrics["accuracy"]                                                      # doctest: +SKIP
        0.91
    """
    spec = private_spec(spec) if privacy is not None else spec
    folder = _checked(delta, train_data, validation_data, metric_fn, spec, Path(folder))
    check_pruning(delta, pruning, spec, privacy is not None)
    start, memory = time.monotonic(), PeakMemory()
    facts = _facts({"spec": spec, "privacy": privacy, "prune": pruning}, train_data, collate)
    _check_spent(delta, privacy is None or resume is False)  # before a checkpoint is removed
    begun = _begin(folder, resume, facts)
    ledger = open_ledger(delta, privacy, spec, len(train_data), begun)
    journal = Journal(folder)
    journal.rewind(step_of(begun) if begun else -1)

    def judge() -> dict[str, float]:
        return evaluate(delta.model, validation_data, collate, metric_fn, spec.eval_batch_size, step=step,
                        precision=spec.precision)

    with _account(delta, ledger), surroundings(delta, spec), Signals() as signals:
        if begun is None:
            _calibrate(delta, train_data, collate)
        pruner = open_pruner(delta, train_data, collate, pruning, spec, begun is None)
        features = functools.cache(lambda: open_features(delta, train_data, collate, spec, folder, signals, report))
        trainer = make_trainer(delta, train_data, validation_data, judge, collate, spec, folder, facts, journal,
                               report, signals, features if spec.cache else None, ledger, pruner, objective)
        trainer.train(resume_from_checkpoint=begun)
        state = trainer.state
        _check_told(signals, state, folder, ledger)
        best = Path(state.best_model_checkpoint) if spec.best and state.best_model_checkpoint else None
        if best is not None:
            trainer._load_best_model()
    remove_own(spec, folder)
    return TrainResult(
        steps=state.global_step, epochs=float(state.epoch or 0), seconds=time.monotonic() - start,
        peak_memory_mb=memory.peak(), added_memory_mb=memory.peak() - memory.start,
        metrics=_metrics_at(state.log_history, step_of(best) if best else state.global_step), best=best,
        resumed_from=begun, stopped_early=state.global_step < state.max_steps, history=journal.lines(),
        privacy=delta.info.get("privacy") if ledger is not None else None)


@contextmanager
def _account(delta: Delta, ledger: Ledger | None) -> Iterator[None]:
    """Write down what a private run spent, also one that was stopped."""
    try:
        yield
    finally:
        if ledger is not None and ledger.steps:
            delta.info["privacy"] = ledger.report()


def _check_told(signals: Signals, state: Any, folder: Path, ledger: Ledger | None) -> None:
    if signals.told and state.global_step < state.max_steps:
        raise Interrupted(f"interrupted by {signals.told} after step {state.global_step} of {state.max_steps}.",
                          f"Saved: {last_checkpoint(folder)}. Run it again to go on from there.",
                          f"Spent: epsilon {ledger.spent():.3f} at delta {ledger.spec.delta}." if ledger else "")


def _calibrate(delta: Delta, data: Any, collate: Collate) -> None:
    """Give the data to methods that start from it: up to 1024 examples spread over it, one a batch."""
    count = min(len(data), CALIBRATION)
    for method in delta.methods:
        if method.needs_data:
            batches = (on_device(collate([data[i * len(data) // count]]), delta.model) for i in range(count))
            method.calibrate(delta, batches)


def _check_spent(delta: Delta, anew: bool) -> None:
    """Errors: DeltaError for a delta that another run trained privately: what that spent would be forgotten, or a plain
    run would promise it."""
    if anew and "privacy" in delta.info:
        raise DeltaError(f"delta '{delta.name}' was trained with differential privacy already, and each run spends.",
                         "Attach a new one; or, to give the promise up, delete delta.info['privacy'] first.")


def open_ledger(delta: Delta, privacy: PrivacySpec | None, spec: TrainSpec, examples: int,
                begun: Path | None) -> Ledger | None:
    """The account of a private run, with the noise that it was begun with."""
    _check_spent(delta, begun is None)
    if privacy is None:
        return None
    batch = privacy.batch_size or spec.batch_size
    steps = spec.steps or math.ceil(spec.epochs * math.ceil(examples / batch))
    sigma = None if begun is None else float(read_checkpoint(begun).facts["privacy"]["sigma"])
    return Ledger(privacy, examples, batch, steps, sigma)


def _checked(delta: Delta, train_data: Any, validation_data: Any, metric_fn: Any, spec: TrainSpec,
             folder: Path) -> Path:
    if not len(train_data):
        raise DataError("there are no examples to train on.")
    if not delta.active:
        raise DeltaError(f"delta '{delta.name}' is not active.", "Call delta.activate() first.")
    if spec.best is not None:
        if validation_data is None:
            raise RecipeError("train.best: there is no validation data to choose by.",
                              "Give data.validation, set data.validation_fraction, or leave train.best out.")
        more_is_better(spec)
        if metric_fn is None and spec.best.removeprefix("eval_") != "loss":
            raise RecipeError(f"train.best: '{spec.best}' needs a metric function.", "Without one there is: loss")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{folder}: cannot be made: {error.strerror}.", "Choose another folder.") from error
    return folder


def _facts(specs: Mapping[str, Any], data: Any, collate: Collate) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    given = {part: spec.model_dump(mode="json") for part, spec in specs.items() if spec is not None}
    return {**given, "data": fingerprint(data, collate)}


def fingerprint(data: Any, collate: Collate) -> dict[str, Any]:
    """The number of examples, and a SHA-256 over up to eight of them, spread over the data."""
    size = len(data)
    chosen = sorted({i * (size - 1) // 7 for i in range(8)}) if size > 1 else [0]
    digest = hashlib.sha256()
    for key, value in sorted(collate([data[i] for i in chosen]).items()):
        values = value.tolist() if isinstance(value, Tensor) else value
        digest.update(json.dumps([key, values], default=str).encode())
    return {"examples": size, "sample": digest.hexdigest()}


def _begin(folder: Path, resume: Any, facts: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, once it is sure that it is of this very run."""
    tidy(folder)
    if resume is False:
        begun = None
    elif resume == "auto":
        begun = last_checkpoint(folder)
        if begun is None and checkpoints(folder):
            log.warning("%s: none of its checkpoints verifies; the run starts over", folder)
    else:
        begun = Path(resume)
        if begun.parent.absolute() != folder.absolute():
            raise TrainError(f"{begun}: not a checkpoint of {folder}.", "Copy it there to go on from it.")
    if begun is not None:
        found = read_checkpoint(begun)
        _same(begun, found.facts.get("run"), facts)
        best = json.loads(found.state).get("best_global_step")
        prune(begun, facts["spec"]["keep"], begun.with_name(f"checkpoint-{best}"))   # its save may have been killed
    if resume != "auto":
        for other in checkpoints(folder):
            if begun is None or step_of(other) > step_of(begun):
                remove(other)
    return begun


def _same(path: Path, told: Any, own: Mapping[str, Any]) -> None:
    over = "Set resume=False to start over, or choose another folder."
    if not isinstance(told, dict) or not isinstance(told.get("spec"), dict):
        raise TrainError(f"{path}: was not made by fit.", over)
    begun = TrainSpec().model_dump(mode="json") | told["spec"]      # an older slimtune did not know every key
    for key, value in own["spec"].items():
        if key not in FREE and begun[key] != value:
            raise RecipeError(f"train.{key}: this run was begun with {begun[key]}, not with {value}.",
                              f"Its folder is {path.parent}.", over)
    for part in ("privacy", "prune"):
        before, now = told.get(part) or {}, own.get(part) or {}
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            raise RecipeError(f"{part}: this run was begun with another ({listing(changed)}).",
                              f"Its folder is {path.parent}.", over)
    if told.get("data") != own["data"]:
        raise RecipeError("data: this run was begun with other training data.",
                          f"Its folder is {path.parent}.", over)


def _metrics_at(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    found = [line for line in history if line.get("step") == step and any(k.startswith("eval_") for k in line)]
    return {k.removeprefix("eval_"): v for k, v in found[-1].items() if k.startswith("eval_")} if found else {}
