"""The page of the robust-ticket experiment: a table of means over seeds, what held, and where the tickets prune."""
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from textwrap import fill
from typing import Any

EPOCHS, PASSES, ETA = 20, 5, 0.03
"""Of the paper's search, on SST-2."""
LONGER = "longer"
"""The dense model that is trained for as many steps as the search and the ticket take together."""
HEAD = """# Robust lottery tickets

Made by `python -m slimtune.bench.robust`; do not edit. Figures: `benchmarks/results/robust.json`.

The system of Zheng et al., 2022 (arXiv 2211.03013), on MiniLM-L6 and SST-2: gates on the weights of the blocks' linear
maps, one for every {s[rows]} x {s[columns]} of them, are learned against an adversary on the word embeddings, a ticket
of {sparsity:.0%} sparsity is drawn, put back to the pretrained weights and trained with the plain loss. The pooler,
which this encoder has no pretrained weights for, is not pruned. Beside it the dense model, and the magnitude ticket, of
single weights. All three are trained the same way: {t[steps]} steps of batch {t[batch_size]}, AdamW at
{t[learning_rate]:g}, {t[precision]} under autocast. The search: {s[steps]} steps of K = {a[steps]} passes (the paper:
{epochs} epochs of {passes}), gates at {s[learning_rate]:g}, lambda {s[strength]:g}, eta {a[rate]:g} (the paper:
{eta:g}). Seeds: {seeds}.

{sentences} sentences of the test file are attacked. *Words*: the greedy substitution of `objectives/swap.py`, at most
{share:.0%} of the words, up to {candidates} candidates each from the pretrained encoder's own neighbours at a cosine of
{threshold:g} or more; words that the training phrases tell to be of opposite classes do not stand for each other. There
is no sentence encoder and no part-of-speech check, so figures do not compare with the paper's, which come from
TextAttack. *PGD r*: the largest disturbance of a sentence's word embeddings has norm r, in {ball[steps]} steps; a
word's embedding has norm {norm:.2f} on average. Shares in per cent; Suc = (Clean - Aua) / Clean; #Query is of what was
right at first.

Settings were chosen on the training phrases and sentences of the validation file. Its sentences share phrases with the
training file, so their scores do not compare with the test's.

"""


def page(found: Mapping[str, Any]) -> str:
    """The document of the results: {"settings": ..., "facts": ..., "seeds": {seed: {model: {attack: ...}}}}."""
    own = found["settings"]
    seeds = {seed: made for seed, made in found["seeds"].items() if made}
    models = list(dict.fromkeys(name for made in seeds.values() for name in made))
    attacks = [key for key in next(iter(seeds.values()))[models[0]] if key == "words" or key.startswith("pgd")]
    numbers = {key: own[key] for key in ("sparsity", "sentences", "share", "candidates", "threshold")}
    top = HEAD.format(t=own["tune"], s=own["search"], a=own["adversary"], ball=own["balls"][0], seeds=" ".join(seeds),
                      epochs=EPOCHS, passes=PASSES, eta=ETA, norm=found["facts"]["embedding_norm"], **numbers)
    lines = ["| model | Clean | " + " | ".join(f"{_title(key)}: Aua | Suc | #Query" for key in attacks) + " |",
             "|---|---" + "|---|---|---" * len(attacks) + "|"]
    for name in models:
        rows = [made[name] for made in seeds.values() if name in made]
        cells = [_cell([100 * row["words"]["clean"] for row in rows])]
        for key in attacks:
            cells += [_cell([100 * row[key]["under_attack"] for row in rows]),
                      _cell([100 * row[key]["success"] for row in rows]), _cell([row[key]["queries"] for row in rows])]
        lines.append(f"| {_label(name, own)} | " + " | ".join(cells) + " |")
    return top + "\n".join([*lines, "", *_verdict(seeds, attacks), *_length(found), *_where(seeds), ""])


def _label(name: str, own: Mapping[str, Any]) -> str:
    return f"dense, {own['tune']['steps'] + own['search']['steps']} steps" if name == LONGER else name


def _title(key: str) -> str:
    return "PGD" + key.removeprefix("pgd") if key.startswith("pgd") else key.capitalize()


def _cell(values: Sequence[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def _verdict(seeds: Mapping[str, Any], attacks: Sequence[str]) -> list[str]:
    """What of the goal holds, told from the figures alone."""
    whole = [made for made in seeds.values() if {"dense", "magnitude", "robust"} <= made.keys()]
    if not whole:
        return []
    lines = ["## The goal: above both under attack, and clean within 3 points of dense", ""]
    for key in attacks:
        ahead = {other: _ahead(whole, other, key) for other in ("dense", "magnitude")}
        holds = "holds" if min(ahead.values()) > 0 else "does not hold"
        lines.append(f"- {_title(key)}: {holds}; {ahead['dense']:+.1f} points beside dense, {ahead['magnitude']:+.1f} "
                     "beside magnitude.")
    clean = _ahead(whole, "dense", "words", "clean")
    lines.append(f"- Clean: {'holds' if clean >= -3 else 'does not hold'}; {clean:+.1f} points beside dense.")
    if longer := [made for made in whole if LONGER in made]:
        told = ", ".join(f"{_title(key)} {_ahead(longer, LONGER, key):+.1f}" for key in attacks)
        clean = _ahead(longer, LONGER, "words", "clean")
        lines.append(f"- Control, {len(longer)} of {len(whole)} seeds, beside dense for as many steps as search and "
                     f"ticket: {told}, clean {clean:+.1f}.")
    count = whole[0]["dense"]["words"]["examples"]
    error = 50 / count ** 0.5
    return [*lines, "", f"A share of {count} sentences has a standard error of up to {error:.1f} points.", ""]


def _ahead(seeds: Sequence[Mapping[str, Any]], other: str, key: str, what: str = "under_attack") -> float:
    """Points that the robust ticket is above another model, the mean over seeds."""
    return mean(100 * (made["robust"][key][what] - made[other][key][what]) for made in seeds)


def _length(found: Mapping[str, Any]) -> list[str]:
    """How long the search was, told from the settings: what is not known of a longer one."""
    own, phrases = found["settings"], found["facts"]["phrases"]
    steps, size, passes = own["search"]["steps"], own["tune"]["batch_size"], own["adversary"]["steps"]
    whole = EPOCHS * phrases // size
    text = (f"The robust ticket's gates were searched for {steps} steps of {size} phrases, "
            f"{steps * size / phrases:.2f} of an epoch of the {phrases:,} training phrases, with K = {passes}. "
            f"The paper's {EPOCHS} epochs would be {whole:,} steps here, {whole / steps:.0f} times as many, "
            f"with K = {PASSES}.")
    return ["## How long the search was", "", fill(text, 120), ""]


def _where(seeds: Mapping[str, Any]) -> list[str]:
    """The share that each block keeps, of the first seed's tickets."""
    made = next(iter(seeds.values()))
    tickets = {name: row["kept"] for name, row in made.items() if "kept" in row}
    if not tickets:
        return []
    places = list(dict.fromkeys(_place(path) for kept in tickets.values() for path in kept))
    lines = ["## What is kept, by block", "", "| ticket | " + " | ".join(places) + " |",
             "|---" * (len(places) + 1) + "|"]
    for name, kept in tickets.items():
        shares = [mean(100 * v for path, v in kept.items() if _place(path) == place) for place in places]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    return [*lines, "", "Per cent; the mean over a block's matrices."]


def _place(path: str) -> str:
    number = re.search(r"layer\.(\d+)\.", path)
    return number[1] if number else "pooler"
