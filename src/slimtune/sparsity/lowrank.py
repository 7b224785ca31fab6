"""Low rank: a linear map as the product of two thin ones, which has r (d_in + d_out) weights.

    W = U S V^T  ~  (U_r sqrt(S_r)) (sqrt(S_r) V_r^T),     the best rank-r matrix in the Frobenius norm

Source: Eckart and Young, 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.
"""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimtune.core import Site, deltas, dissect
from slimtune.core.merge import wide
from slimtune.errors import DeltaError, MethodError, listing
from slimtune.sparsity.edits import Edits, inputs_of
from slimtune.sparsity.parts import Factored
from slimtune.sparsity.probe import outputs, probe

Factors = tuple[Tensor, Tensor]


@torch.no_grad()
def low_rank(model: nn.Module, ranks: Mapping[str, int | Factors], *,
             inputs: Mapping[str, object] | Tensor | None = None) -> dict[str, float]:
    """Replace linear maps by two thinner ones, in place; what each loses, |W - W_r| / |W|, by site.

    ranks: by site or pattern (`mlp.up`, `encoder.0.attn.q`; a later one wins): the rank, or (up, down) to take as
    they are. Ranks of zeros in them are sliced by `shrink`. inputs: a batch to try the model on.
    Shapes: up (d_out, r), down (r, d_in).
    Errors: MethodError for a rank that saves nothing, a fused projection, a model that does not run with it;
    SiteError for a pattern that matches nothing; the model is then as it was.
    Example:
        >>> from slimtune.testing import tiny
        >>> model = tiny("bert")
        >>> errors = low_rank(model, {"mlp.up": 8})
        >>> sum(p.numel() for p in model.bert.encoder.layer[0].intermediate.dense.parameters())
        832
    """
    if found := deltas(model):
        raise DeltaError(f"deltas are attached that were made for the whole matrices: {listing(found)}.",
                         "Fold them in with shrink(), or detach them.")
    anatomy, edits, lost = dissect(model), Edits(), {}
    plan = {s.name: (s, rank) for pattern, rank in ranks.items() for s in anatomy.select((pattern,), who="low_rank")}
    batch = probe(model) if inputs is None else inputs
    try:
        for name, (site, rank) in plan.items():
            new, lost[name] = _factor(model, site, rank)
            edits.module(model, site.path, new)
        outputs(model, batch)
    except (AttributeError, RuntimeError, TypeError) as error:
        edits.undo()
        raise MethodError(f"a {anatomy.model_type} does not run with maps of low rank there: {error}",
                          "Some modules read a weight by name, such as T5's mlp.down. Leave those out.") from error
    except BaseException:
        edits.undo()
        raise
    return lost


def _factor(model: nn.Module, site: Site, rank: int | Factors) -> tuple[Factored, float]:
    module = model.get_submodule(site.path)
    if site.at != "output" or site.source is not None or site.part is not None or isinstance(module, Factored):
        raise MethodError(f"'{site.name}' is no linear map of its own that could be factored.",
                          "Choose of attn.q attn.k attn.v attn.o mlp.up mlp.gate mlp.down, none of them fused.")
    weight, bias = wide(inputs_of(module)), module._parameters.get("bias")
    up, down = _svd(weight, rank) if isinstance(rank, int) else (rank[0].to(weight), rank[1].to(weight))
    if up.shape[0] != site.d_out or down.shape != (up.shape[1], site.d_in):
        raise MethodError(f"the factors of '{site.name}' are {tuple(up.shape)} and {tuple(down.shape)}; it maps "
                          f"{site.d_in} to {site.d_out}.", "Give up (d_out, r) and down (r, d_in).")
    r, most = up.shape[1], (weight.numel() - 1) // sum(weight.shape)
    if not 1 <= r <= most:
        raise MethodError(f"rank {r} saves nothing at '{site.name}', which maps {site.d_in} to {site.d_out}.",
                          f"Use 1 to {most}.")
    with torch.device("meta"):  # its tensors are put in
        new = Factored(site.d_in, site.d_out, r, bias=False)
    like = inputs_of(module)
    new.down.weight = nn.Parameter(down.to(like.dtype), like.requires_grad)
    new.up.weight = nn.Parameter(up.to(like.dtype), like.requires_grad)
    new.up.bias = bias  # type: ignore[assignment]
    return new.train(module.training), float((weight - up @ down).norm() / weight.norm().clamp_min(1e-30))


def _svd(weight: Tensor, rank: int) -> Factors:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()
