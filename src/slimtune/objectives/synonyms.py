"""A synonym table from an encoder's own word embeddings: near in cosine, whole words alone.

    c is a candidate for w  if  cos(e_w, e_c) >= threshold,  nearest first, at most `limit`

Neighbours in a language model's table are of one kind with a word and not always of one meaning: antonyms are near as
well. `veto` keeps out what changes the meaning for the task at hand.
"""
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slimtune.errors import DataError

WORD = re.compile(r"[a-z]{3,}")
CHUNK = 1024


@torch.no_grad()
def synonyms(tokens: Sequence[str], embeddings: Tensor, *, words: Iterable[str] | None = None, threshold: float = 0.5,
             limit: int = 8, veto: Callable[[str, str], bool] | None = None) -> dict[str, tuple[str, ...]]:
    """For each word, the words that may stand for it; those without any are left out.

    tokens: the vocabulary in the order of ids; words of three letters and more count, pieces and names of special
    tokens do not. words: which to make rows for, by default all. veto(word, candidate): true for what must not be.

    Shapes:
        embeddings: [len(tokens), d]

    Errors: DataError when the tokens are not as many as the embeddings.

    Example:
        >>> vectors = torch.tensor([[1., 0], [1, 0], [1, 0], [.9, .1], [0, 1]])
        >>> synonyms(["[PAD]", "good", "##ly", "fine", "mud"], vectors)
        {'good': ('fine',), 'fine': ('good',)}
    """
    if len(tokens) != len(embeddings):
        raise DataError(f"{len(tokens)} tokens and {len(embeddings)} embeddings.", "Give the vocabulary by its ids.")
    whole = [i for i, token in enumerate(tokens) if WORD.fullmatch(token)]
    if len(whole) < 2:
        raise DataError("the vocabulary has no whole words of three letters and more.",
                        "It reads uncased vocabularies of words and pieces, as BERT's.")
    wanted = set(tokens) if words is None else set(words)
    rows = [place for place, i in enumerate(whole) if tokens[i] in wanted]
    unit = functional.normalize(embeddings[whole].float(), dim=-1)
    names = [tokens[i] for i in whole]
    table: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(rows), CHUNK):
        part = rows[start:start + CHUNK]
        near, index = (unit[part] @ unit.T).topk(min(4 * limit + 1, len(whole)))
        for place, cosines, others in zip(part, near.tolist(), index.tolist(), strict=True):
            order = sorted((-c, o) for c, o in zip(cosines, others, strict=True) if c >= threshold and o != place)
            kept = [names[o] for _, o in order if veto is None or not veto(names[place], names[o])]
            if kept:
                table[names[place]] = tuple(kept[:limit])
    return table
