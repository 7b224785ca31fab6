"""Are robust tickets robust? A real encoder, real sentences, three models of equal budget under two attacks.

    python -m slimtune.bench.robust                       # seed 0, and the page
    python -m slimtune.bench.robust --seeds 0 1 2         # more seeds; what is done already is kept
    python -m slimtune.bench.robust --page                # only the page again

MiniLM-L6 on SST-2: fine-tuned dense; the magnitude ticket, drawn from the fine-tuned weights; the robust ticket, of the
same sparsity; tickets are rewound to the pretrained weights and trained as the dense model was. A control is dense,
trained for as many steps as search and ticket take. A stopped run goes on from the last model that was finished.
"""
import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimtune.bench.results import record, recorded
from slimtune.bench.robust_page import LONGER, page
from slimtune.bench.robust_settings import SETTINGS, TOKENS, WORDS, Settings
from slimtune.core import Delta, attach, dissect
from slimtune.data import DataSpec
from slimtune.data.examples import Collate, Examples
from slimtune.data.tables import Table, read_table
from slimtune.data.text_classification import collator, encode
from slimtune.io.load import load
from slimtune.io.models import load_model, load_tokenizer
from slimtune.io.packages import cache_folder
from slimtune.methods import get
from slimtune.objectives import Attacked, Robustness, WordSwap, adversarial_backward, pgd, synonyms, word_embeddings
from slimtune.recipe.folder import write_text
from slimtune.sparsity.allocation import global_
from slimtune.sparsity.robust import search, state_names, ticket
from slimtune.train import fit
from slimtune.train.predict import autocast

OUT, DOC, DATA = Path("benchmarks/results/robust.json"), Path("docs/robust.md"), Path("../shared/data/text/sst2")
NEAR = 50
"""Batches of the search that are sorted by length together."""
MODELS = ("dense", "magnitude", "robust", LONGER)
"""The order they are made in: the tickets are drawn from the dense model."""
TICKETS = ("magnitude", "robust")


@dataclass(frozen=True)
class Ground:
    """The encoder, its tokenizer, and sentences; loaded once."""

    model: nn.Module
    tokenizer: Any
    collate: Collate
    train: Examples
    phrases: Table
    test: Table

    @classmethod
    def load(cls, folder: Path, judged: str = "test", words: int = 1) -> "Ground":
        """judged: the file whose texts of at least so many words are attacked: validation while settings are chosen."""
        tokenizer = load_tokenizer("minilm")
        phrases, test = _table(folder / "train.tsv", WORDS), _table(folder / f"{judged}.tsv", words)
        train = encode(phrases, _spec(), tokenizer, ("0", "1"), True)
        model = load_model("minilm", "classification", label_names=("negative", "positive"))
        return cls(model, tokenizer, collator(tokenizer), train, phrases, test)

    @cached_property
    def paths(self) -> list[str]:
        """The matrices that are pruned: all linear maps of the blocks. This encoder's pooler is not pretrained."""
        return [f"{site.path}.weight" for site in dissect(self.model).select(["linear"])]

    def sentences(self, count: int) -> list[tuple[str, int]]:
        """The texts to attack, spread evenly over the file, with their labels."""
        texts, labels = self.test.columns["sentence"], self.test.columns["label"]
        chosen = [i * len(texts) // count for i in range(min(count, len(texts)))]
        return [(texts[i].strip(), int(labels[i])) for i in chosen]

    def logits(self, texts: Sequence[str]) -> Tensor:
        """What the word attack asks the model."""
        inputs = self.tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        with torch.no_grad(), autocast(self.model, "bfloat16"):
            return self.model(**inputs).logits


def _spec() -> DataSpec:
    return DataSpec(task="classification", train="train.tsv", text="sentence", max_length=TOKENS)


def _table(path: Path, words: int) -> Table:
    table = read_table(str(path), _spec())
    return table.take([i for i, text in enumerate(table.columns["sentence"]) if len(text.split()) >= words])


# models

def tune(ground: Ground, settings: Settings, seed: int, folder: Path,
         masks: Mapping[str, Tensor] | None = None, more: int = 0) -> Delta:
    """Train the pretrained encoder, all of it, under masks if there are any. more: steps beside those of all."""
    delta = attach(ground.model, get("full")(), "tuned", seed=seed)
    if masks is not None:
        delta.set_masks(state_names(masks))
    spec = settings.tune.model_copy(update={"seed": seed, "steps": (settings.tune.steps or 0) + more})
    fit(delta, ground.train, None, ground.collate, None, spec, folder)
    return delta


def magnitude(ground: Ground, settings: Settings) -> dict[str, Tensor]:
    """Masks without the smallest weights of all matrices together, as the model stands now."""
    return global_({path: ground.model.get_parameter(path).detach().abs() for path in ground.paths}, settings.sparsity)


def robust(ground: Ground, settings: Settings, seed: int) -> dict[str, Tensor]:
    """Masks that are learned against the adversary, the weights standing as they are now."""
    generator = torch.Generator().manual_seed(seed)

    def backward(model: nn.Module, batch: Any, around: Callable[[], AbstractContextManager[Any]]) -> float:
        return adversarial_backward(model, batch, settings.adversary, generator=generator, loss=_loss, around=around)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        gates = search(ground.model, ground.paths, _batches(ground, settings.tune.batch_size, seed), backward,
                       settings.search, report=_say)
    return ticket(gates, settings.sparsity)


def _say(line: Mapping[str, float]) -> None:
    if line["step"] % 10 == 0:
        print("search", {key: round(value, 4) for key, value in line.items()}, flush=True)


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with autocast(model, "bfloat16"):
        return model(**batch).loss


def _batches(ground: Ground, size: int, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Epochs without end, in batches of phrases of like length: these pad half as much."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(row["input_ids"]) for row in ground.train])
    while True:
        for near in torch.randperm(len(lengths), generator=generator).split(size * NEAR):
            batches = near[lengths[near].argsort(stable=True)].split(size)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                if len(batches[i]) == size:
                    yield ground.collate([ground.train[j] for j in batches[i].tolist()])


# attacks

def table(ground: Ground, settings: Settings) -> dict[str, tuple[str, ...]]:
    """The synonyms, from the pretrained word embeddings; words of opposite classes do not stand for each other."""
    odds = log_odds(ground.phrases)

    def veto(word: str, other: str) -> bool:
        a, b = odds.get(word, 0.0), odds.get(other, 0.0)
        return a * b < 0 and abs(a - b) > 2 * settings.evidence

    tokens = ground.tokenizer.convert_ids_to_tokens(range(len(ground.tokenizer)))
    words = {word for text, _ in ground.sentences(settings.sentences) for word in text.split()}
    return synonyms(tokens, word_embeddings(ground.model).weight.detach(), words=words,  # type: ignore[operator,arg-type]
                    threshold=settings.threshold, limit=settings.candidates, veto=veto)


def log_odds(phrases: Table) -> dict[str, float]:
    """log P(word | positive) / P(word | negative), over the training phrases, each counted once, plus one."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for text, label in zip(phrases.columns["sentence"], phrases.columns["label"], strict=True):
        counts[int(label)].update(set(text.split()))
    total = [sum(c.values()) for c in counts]
    return {word: math.log((counts[1][word] + 1) / total[1]) - math.log((counts[0][word] + 1) / total[0])
            for word in {*counts[0], *counts[1]}}


def judge(ground: Ground, settings: Settings, swap: WordSwap) -> dict[str, Any]:
    """Clean, Aua, Suc and #Query of the model as it stands, under the word attack and in each ball."""
    ground.model.eval()
    texts = ground.sentences(settings.sentences)
    found = {"words": _told([swap.attack(ground.logits, text, label) for text, label in texts])}
    rows = [ground.tokenizer(text, truncation=True, max_length=TOKENS) | {"labels": label} for text, label in texts]
    rows.sort(key=lambda row: len(row["input_ids"]))
    batches = [ground.collate(rows[i:i + 50]) for i in range(0, len(rows), 50)]
    for ball in settings.balls:
        with autocast(ground.model, "bfloat16"):
            found[f"pgd {ball.radius:g}"] = _told(pgd(ground.model, batches, ball))
    return found


def _told(attacked: Sequence[Attacked]) -> dict[str, float]:
    r = Robustness.of(attacked)
    changed = [a.changed for a in attacked if a.broken]
    return {"clean": r.clean, "under_attack": r.under_attack, "success": r.success, "queries": r.queries,
            "examples": r.examples, "changed": sum(changed) / len(changed) if changed else 0.0}


# the run

def run(ground: Ground, settings: Settings, seed: int, work: Path, done: dict[str, Any],
        keep: Callable[[], None]) -> None:
    """Make and judge what is not done yet; `keep` is called behind each model."""
    swap = WordSwap(table(ground, settings), settings.share)
    for name in MODELS:
        if name in done:
            continue
        start = time.process_time()
        more, masks = {}, None
        if name in TICKETS:
            masks = _drawn(name, ground, settings, seed, work)
            more["kept"] = {path: round(float(mask.float().mean()), 4) for path, mask in masks.items()}
        delta = tune(ground, settings, seed, work / name, masks, settings.search.steps if name == LONGER else 0)
        made = time.process_time() - start
        if name == "dense":
            delta.save(work / name / "delta")
        done[name] = judge(ground, settings, swap) | more | {
            "cpu_seconds": {"made": round(made, 1), "judged": round(time.process_time() - start - made, 1)}}
        delta.detach()
        keep()


def _drawn(name: str, ground: Ground, settings: Settings, seed: int, work: Path) -> dict[str, Tensor]:
    """The masks of a ticket, from the dense model; kept in a file, so that a search is not run twice."""
    file = work / f"{name}.safetensors"
    if not file.is_file():
        dense = load(ground.model, work / "dense" / "delta", name="dense")
        masks = magnitude(ground, settings) if name == "magnitude" else robust(ground, settings, seed)
        dense.detach()
        save_file(masks, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return load_file(file)


def facts(ground: Ground) -> dict[str, float]:
    """What the page tells beside the scores: the training phrases, and the mean norm of the vocabulary's embeddings."""
    norms = word_embeddings(ground.model).weight.detach().norm(dim=1)  # type: ignore[operator,union-attr]
    return {"phrases": len(ground.train), "embedding_norm": round(float(norms.mean()), 4)}


def main() -> None:
    """Run what is lacking, keep each result as it comes, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of SST-2: train.tsv and test.tsv")
    parser.add_argument("--work", type=Path, default=cache_folder() / "robust", help="where the models are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    found = recorded(options.out, "settings", SETTINGS.told(), seeds={})
    if not options.page:
        torch.set_num_threads(1)
        ground = Ground.load(options.data)
        found["facts"] = facts(ground)
        for seed in options.seeds:
            done = found["seeds"].setdefault(str(seed), {})
            run(ground, SETTINGS, seed, options.work / SETTINGS.digest() / f"seed-{seed}", done,
                lambda: record(options.out, found))
    if any(found["seeds"].values()):
        write_text(options.doc, page(found))


if __name__ == "__main__":
    main()
