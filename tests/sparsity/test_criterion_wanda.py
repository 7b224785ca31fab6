"""Wanda against plain hooks; padding left out; equal inputs give row-wise magnitude."""
import pytest
import torch

from slimtune.core import attach
from slimtune.errors import MethodError
from slimtune.methods import Full, LoRA, Pfeiffer
from slimtune.sparsity.prune import prune
from slimtune.sparsity.target import targets
from slimtune.sparsity.view import View
from slimtune.sparsity.wanda import Wanda
from slimtune.testing import batch, doubled, tiny


def inputs_of(model, path, data):
    """(B, T, d) of each batch, as they enter a module."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(a[0].detach()))
    with torch.no_grad():
        for b in data:
            model(**b)
    handle.remove()
    return kept


def slow(weight, rows):
    norms = torch.stack([torch.sqrt(sum(x[j] ** 2 for x in rows)) for j in range(rows.shape[1])])
    return weight.abs() * norms


@pytest.mark.parametrize(("family", "path"), [
    ("bert", "bert.encoder.layer.1.output.dense"), ("gpt2", "transformer.h.1.mlp.c_proj"),
    ("vit", "vit.layers.1.mlp.fc2")])
def test_equation_without_padding(family, path):
    model, data = tiny(family).double(), [batch(family, seed=s) for s in range(2)]
    if family == "vit":
        data = [doubled(b) for b in data]
        path = next(n for n, m in model.named_modules() if n.endswith(path.rpartition("layers.")[2]))
    kept = inputs_of(model, path, data)
    rows = torch.cat([x[b["attention_mask"].bool()] if "attention_mask" in b else x.flatten(0, 1)
                      for x, b in zip(kept, data, strict=True)])
    assert family == "vit" or len(rows) < sum(x.shape[0] * x.shape[1] for x in kept)
    delta = attach(model, LoRA(rank=1, sites=("attn.o",)))
    weight = model.get_submodule(path).weight.detach()
    score = Wanda().score(View(delta, targets(delta, "base"), data))[f"own.{path}.weight"]
    turned = (weight.T, score.T) if family == "gpt2" else (weight, score)
    torch.testing.assert_close(turned[1], slow(turned[0], rows))


def test_a_decoder_beside_an_encoder_has_its_own_padding():
    """Its tokens are those with a label; its cross-attention's keys read the encoder's."""
    model, b = tiny("t5").double(), batch("t5")
    b["labels"][0, 3:] = -100
    delta = attach(model, LoRA(rank=1, sites=("attn.q",)))
    scores = Wanda().score(View(delta, targets(delta, "base"), [b]))
    for path, mask in (("encoder.block.0.layer.1.DenseReluDense.wo", b["attention_mask"] == 1),
                       ("decoder.block.1.layer.2.DenseReluDense.wo", b["labels"] != -100),
                       ("decoder.block.1.layer.1.EncDecAttention.q", b["labels"] != -100),
                       ("decoder.block.1.layer.1.EncDecAttention.k", b["attention_mask"] == 1)):
        x, = inputs_of(model, path, [b])
        weight = model.get_submodule(path).weight.detach()
        torch.testing.assert_close(scores[f"own.{path}.weight"], slow(weight, x[mask]))


def test_equal_norms_give_row_wise_magnitude_with_exact_counts():
    """The queries of block 0 behind a norm that is turned into one constant for all inputs."""
    masks = []
    for criterion in ("wanda", "magnitude"):
        model = tiny("bert")
        norm = model.bert.embeddings.LayerNorm
        with torch.no_grad():
            norm.weight.zero_()
            norm.bias.fill_(0.7)
        delta = attach(model, Full())
        prune(delta, 0.4, Wanda() if criterion == "wanda" else criterion, on="base", allocation="row",
              batches=[batch("bert")], sites=("attn.q", "mlp.down"), blocks=(0,))
        masks.append(delta.masks)
    query, down = masks[0]
    assert torch.equal(masks[0][query], masks[1][query])
    assert not torch.equal(masks[0][down], masks[1][down])
    assert set((~masks[0][query]).sum(1).tolist()) == {int(0.4 * 32)}
    assert set((~masks[0][down]).sum(1).tolist()) == {int(0.4 * 64)}


def test_of_an_added_matrix_nothing_enters():
    delta = attach(tiny("bert"), Pfeiffer(bottleneck=2))
    with pytest.raises(MethodError, match="no linear map"):
        Wanda().score(View(delta, targets(delta), [batch("bert")]))


def test_block_by_block_reads_what_the_pruned_blocks_give():
    """As the paper's code does: the second block's scores are those of the model whose first block is masked."""
    def masks(*steps):
        model = tiny("bert", initializer_range=0.5)  # a block that is heard above its residual
        delta = attach(model, LoRA(rank=1))
        for blocks in steps:
            prune(delta, 0.6, Wanda(), on="base", allocation="row", blocks=blocks, batches=[batch("bert")])
        return delta.masks

    once, twice = masks((0, 1)), masks((0,), (1,))
    assert once.keys() == twice.keys()
    same = {n: torch.equal(m, twice[n]) for n, m in once.items()}
    assert all(same[n] for n in same if "layer.0" in n)
    assert not all(same.values())
