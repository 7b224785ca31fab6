"""DeBERTa's attention where its projections have parameters of each example.

    c2p_i = Q_i (R W_k)^T,    p2c_i = K_i (R W_q)^T,    R the table of relative positions, (P, d)

One W_q and W_k work on the text, and on the table once for all examples. With an example axis what a delta adds on
the table is one for each example, beside the frozen product, which stays one.
"""
import copy
from collections.abc import Callable, Iterable, Iterator
from threading import local
from typing import Any

from torch import Tensor, nn

MAKER = "disentangled_attention_bias"


class _Here(local):
    rows: int | None = None


_here = _Here()


def spread(x: Tensor) -> Tensor:
    """One row that stands for all examples as a row for each, while the table passes; anything else as it is."""
    return x if _here.rows is None or x.shape[0] != 1 else x.expand(_here.rows, *x.shape[1:])


def each_bias(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[nn.Module, str, Callable[..., Tensor]]]:
    """(module, name, function): what stands in for a function of DeBERTa's attentions, while examples differ."""
    for _, module in modules:
        if hasattr(type(module), MAKER):
            yield module, MAKER, _each(module)


def _each(attention: Any) -> Callable[..., Tensor]:
    heads = attention.num_attention_heads

    def bias(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shapes: query (B heads, T, c); what the projections make of the table, (1 or B, P, d), becomes one of B."""
        rows = query.shape[0] // heads
        own = copy.copy(attention)
        own.__dict__.update(num_attention_heads=query.shape[0], transpose_for_scores=lambda x, _:
                            attention.transpose_for_scores(x.expand(rows, -1, -1), heads))
        before, _here.rows = _here.rows, rows
        try:
            return getattr(type(attention), MAKER)(own, query, *args, **kwargs)
        finally:
            _here.rows = before

    return bias
