"""What the command line's tests are made of: a tiny model with a tokenizer, sentences and tables."""
import csv
import random
from pathlib import Path

WORDS = {"good": ["good", "fine", "great", "lovely"], "bad": ["bad", "poor", "awful", "dreadful"]}
FILLERS = ["the", "film", "was", "a", "story", "and", "an", "actor", "scene", "with", "it", "for"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_model(family: str, folder: Path) -> Path:
    """A tiny model of a family with a tokenizer of whole words, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from slimtune.testing import tiny

    words = [*SPECIAL, *FILLERS, *WORDS["good"], *WORDS["bad"]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if family == "bert":
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    if family != "bert":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    ids = {"pad_token_id": 0, "initializer_range": 0.1} if family == "bert" else {"pad_token_id": 0, "eos_token_id": 3}
    tiny(family, dropout=True, **ids).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = ("good", "bad")[i % 2]
        words = rng.choices(FILLERS, k=rng.randint(1, 4)) + rng.choices(WORDS[label], k=4)
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path
