"""The page of the pruning benchmark: a table of models, one of times, and a picture of accuracy against speed."""
import io
import re
from collections.abc import Mapping
from typing import Any

TEST = 3_080
HEAD = """# A smaller encoder for one task

Made by `python -m slimtune.bench.prune`; do not edit. Figures: `benchmarks/results/prune.json`.

MiniLM-L6 (6 layers of 384) fine-tuned on the 77 intents of banking77: 10,003 training and {test:,} test questions of at
most {tokens} tokens, {dense[epochs]:g} epochs. Then a share of the multiply-adds of heads and neurons is pruned in one
step, the model is sliced, and trained again for {again[epochs]:g} epochs with the dense model as its teacher (weight
{teach[weight]:g}, temperature {teach[temperature]:g}). One seed; the standard error of an accuracy is about
{error:.1f} points, and of a difference of two models on the same questions less. Rates were set once, on nothing but
whether the training loss falls; the last step is scored.

- fisher: heads and neurons by squared gradients of their gates on {scored} training questions, under a budget of
  multiply-adds over all layers together (Kwon et al., 2022).
- magnitude: the same share of heads and of neurons in each layer, by the sum of the magnitudes of their weights.
- torch-pruning: Torch-Pruning {version}'s BasePruner with group magnitudes, whole heads, hidden dimensions left alone,
  at the smallest ratio that reaches the share; trained again as the others.

{models}
{times}
{picture}
"""
MODELS = ("| model | parameters | multiply-adds, {tokens} tokens | file, float32 | file, int8 | accuracy when sliced | "
          "accuracy | label loyalty | probability loyalty | accuracy, int8 |\n" + "|---" * 10 + "|\n")
BELOW = 1.0
"""Points below the dense model at which the picture has its dashed line."""
PICTURE = f"""![accuracy against speed]({{drawn}})

The dashed line is {BELOW:g} point below the dense model's accuracy in float32 PyTorch."""


def page(found: Mapping[str, Any], drawn: str = "prune.svg") -> tuple[str, str]:
    """(the document, the picture as SVG). drawn: the picture's file, as the document names it."""
    setting, arms = found["setting"], found["arms"]
    accuracy = arms.get("dense", {}).get("accuracy", 0.8)
    text = HEAD.format(tokens=setting["tokens"], scored=setting["scored"], dense=setting["dense"],
                       again=setting["again"], teach=setting["teach"],
                       error=100 * (accuracy * (1 - accuracy) / TEST) ** 0.5, test=TEST,
                       version=arms.get("torch-pruning-50", {}).get("version", ""),
                       models=_models(found), times=_times(found),
                       picture=PICTURE.format(drawn=drawn) if found.get("latency") else "")
    return text, picture(found)


def _models(found: Mapping[str, Any]) -> str:
    arms, tokens = found["arms"], found["setting"]["tokens"]
    if "dense" not in arms:
        return ""
    rows = [_model(name, arm, arms["dense"], found.get("int8", {}).get(name)) for name, arm in arms.items()]
    return MODELS.format(tokens=tokens) + "\n".join(rows) + "\n"


def _model(name: str, arm: Mapping[str, Any], dense: Mapping[str, Any], int8: Mapping[str, Any] | None) -> str:
    share = arm["macs"] / dense["macs"]
    sliced = "" if arm["before_training"] is None else f"{100 * arm['before_training']:.1f}"
    cells = [name, f"{arm['parameters']:,}", f"{arm['macs']:,} ({share:.0%})", f"{arm['bytes']['model'] / 1e6:.1f} MB",
             f"{int8['bytes']['int8.onnx'] / 1e6:.1f} MB" if int8 else "", sliced, f"{100 * arm['accuracy']:.1f}",
             f"{arm.get('label_loyalty', 1):.3f}", f"{arm.get('probability_loyalty', 1):.3f}",
             f"{100 * int8['accuracy']:.1f}" if int8 else ""]
    return "| " + " | ".join(cells) + " |"


def _times(found: Mapping[str, Any]) -> str:
    if not found.get("latency"):
        return ""
    sizes = list(found["latency"])
    first = found["latency"][sizes[0]]
    where = first["setting"]
    cpu = found.get("environment", {}).get("cpu", "")
    lines = [f"Times of {found['setting']['tokens']} real tokens, one thread, {first['rounds']} rounds in which every "
             f"contender runs once, the dense model in float32 PyTorch as 1 ({cpu}; "
             f"{', '.join(where.get('instruction_sets', ()))}). The speed-up is the median over rounds of the ratio of "
             "wall-clock times; p10 to p90 are those of the time itself.", "",
             "| contender | " + " | ".join(f"batch {s}: p50 (p10 to p90) ms | speed-up" for s in sizes) + " |",
             "|---|" + "---|---|" * len(sizes)]
    for name in first["wall"]:
        cells = []
        for size in sizes:
            run = found["latency"][size]
            wall = run["wall"][name]
            cells += [f"{wall['p50']:.2f} ({wall['p10']:.2f} to {wall['p90']:.2f})", f"{run['speedup'][name]:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def points(found: Mapping[str, Any], size: str) -> list[tuple[str, str, float, float]]:
    """(way, label, speed-up, accuracy in %) of every contender that was timed and scored."""
    made = []
    for name, speed in found["latency"][size]["speedup"].items():
        arm, _, engine = name.partition(" ")
        int8 = engine.endswith("int8")
        scored = found.get("int8", {}).get(arm) if int8 else found["arms"].get(arm)
        if scored is not None:
            made.append((found["arms"][arm]["how"], f"{arm} {engine}", speed, 100 * scored["accuracy"]))
    return made


def picture(found: Mapping[str, Any]) -> str:
    """Accuracy against speed-up, a panel for each batch size. Errors: ImportError without matplotlib."""
    if not found.get("latency"):
        return ""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slimtune"  # else every drawing has other identifiers
    from matplotlib import pyplot

    marks = {"torch": "o", "onnxruntime float32": "s", "onnxruntime int8": "^"}
    colours = {"dense": "#222222", "fisher": "#0b6e4f", "magnitude": "#c8553d", "torch-pruning": "#3d5a98"}
    figure, panels = pyplot.subplots(1, len(found["latency"]), figsize=(13, 4.2), sharey=True, squeeze=False)
    for panel, size in zip(panels[0], found["latency"], strict=True):
        for how, label, speed, accuracy in points(found, size):
            engine = label.partition(" ")[2]
            panel.plot(speed, accuracy, marks[engine], color=colours[how], markersize=7, alpha=0.85)
        panel.set_title(f"batch {size}")
        panel.set_xlabel("times as fast as dense float32 PyTorch")
        panel.axhline(100 * found["arms"]["dense"]["accuracy"] - BELOW, color="#999999", linewidth=0.8, linestyle="--")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy, %")
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="", label=h) for h, c in colours.items()]
    handles += [pyplot.Line2D([], [], color="#777777", marker=m, linestyle="", label=e) for e, m in marks.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M)
