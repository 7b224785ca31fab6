"""The card of a run: what was trained on what, what it counts, how it scored, how to load it, what to know."""
from typing import Any

from slimtune.data.metrics import METRICS
from slimtune.data.spec import IMAGES
from slimtune.recipe.promise import promise
from slimtune.recipe.tree import Recipe

_NAMES = {"adapter": "added by the method", "norms": "norms of the backbone, trained beside it",
          "head": "task head", "stored": "numbers in the delta's file", "backbone": "backbone (frozen, not stored)"}


def card(recipe: Recipe, result: dict[str, Any], env: dict[str, Any]) -> str:
    """Markdown, from the resolved recipe, result.json and env.json."""
    lines = [f"# {recipe.name}", "", _what(recipe, result), "", "## Numbers", "",
             "| part | numbers |", "|---|---:|"]
    lines += [f"| {_NAMES[part]} | {result['counts'][part]:,} |" for part in _NAMES]
    lines += ["", f"Adapter and norms are {result['percent']:.3f} % of the backbone. "
              f"The delta's folder takes {result['files']['delta']:,} bytes.", ""]
    for split, scores in result["metrics"].items():
        examples = result["examples"].get(split)
        lines += [f"## Scores on {split} ({examples:,} examples)", "", "| metric | value | unit |", "|---|---:|---|"]
        lines += [f"| {name} | {value:.4f} | {unit(name)} |" for name, value in scores.items()]
        lines.append("")
    if result.get("privacy"):
        lines += promise(result["privacy"])
    lines += ["## Load it", "", "```python", *_loading(recipe, result), "```", "", "## Know", ""]
    lines += [f"- {note}" for note in notes(recipe, result, env)]
    return "\n".join(lines) + "\n"


def unit(metric: str) -> str:
    """A metric's range, and which way is better.

    Example:
        >>> unit("macro_f1"), unit("loss")
        ('0 to 1, more is better', 'nats, less is better')
    """
    if metric == "loss":
        return "nats, less is better"
    known = METRICS.get(metric)
    return f"{known.unit}, {'more' if known.higher else 'less'} is better" if known else ""


def _what(recipe: Recipe, result: dict[str, Any]) -> str:
    methods = " + ".join(type(m).__name__ for m in recipe.method)
    labels = f" with the labels {', '.join(result['labels'])}" if 0 < len(result["labels"]) <= 12 else (
        f" with {len(result['labels'])} labels" if result["labels"] else "")
    source = recipe.data.dataset or recipe.data.train or recipe.data.path
    return (f"A delta of slimtune: {methods} on `{recipe.model}`, for {recipe.data.task}{labels}, "
            f"trained on `{source}` ({result['examples']['train']:,} examples, {result['steps']:,} steps, seed "
            f"{recipe.seed}). Every setting is in `recipe.yaml`.")


def _loading(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    labels = f", label_names={result['labels']!r}" if result["labels"] else ""
    if len(labels) > 200:
        labels = f", num_labels={len(result['labels'])}"
    return ["import slimtune", "from slimtune.io.models import load_model", "",
            f"model = load_model({recipe.model!r}, {recipe.data.task!r}{labels}, seed={recipe.seed})",
            f"slimtune.load(model, {str(recipe.folder / 'delta')!r})",
            f"# or: slimtune predict {recipe.folder} " + (
                "--image photo.jpg" if recipe.data.task in IMAGES else '--text "..."')]


def notes(recipe: Recipe, result: dict[str, Any], env: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    told = ["One run with one seed: the spread over seeds is not known."]
    chosen = recipe.train.best
    told.append(f"The checkpoint with the best {chosen} on validation was kept." if chosen else
                "The weights of the last step were kept; no split chose among checkpoints.")
    if "test" not in result["metrics"]:
        told.append("There was no test split: scores on validation are of data that may have guided choices.")
    for split, cut in result["cut"].items():
        if cut:
            told.append(f"{cut:,} of {result['examples'][split]:,} texts of {split} were longer than "
                        f"{recipe.data.max_length} tokens and lost their end.")
    told += _of_images(recipe, result.get("images"))
    if recipe.data.limit:
        told.append(f"Trained on at most {recipe.data.limit:,} examples of the training data.")
    told.append(f"Training took {result['seconds']['train']:.1f} s and {result['peak_memory']:.0f} MiB at its peak, on "
                f"{env['cpu']} with {env['threads']} threads" + (f" and {env['gpu']}" if env["gpu"] else "") + ".")
    return told


def _of_images(recipe: Recipe, images: dict[str, Any] | None) -> list[str]:
    if images is None:
        return []
    side = images["size"]
    told = [f"Images are {side} x {side}, resized by {images['resize']}, normalised by {images['normalize']}; "
            f"augmentation: {', '.join(images['augment']) or 'none'}."]
    told += [f"{len(bad):,} images of {split} could not be decoded and were left out." for split, bad in
             images["left_out"].items()]
    if recipe.data.train_size or recipe.data.shots:
        told.append("The training images are a draw of the set's, as many of each class, with seed "
                    f"{recipe.data.seed}.")
    return told
