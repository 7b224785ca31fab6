"""Units against slow loops: n:m, blocks, rows, columns, whole tensors, ranks."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import slimtune as st
from slimtune.errors import MethodError
from slimtune.sparsity.granularity import NM, Block, Column, Rank, Row, Whole, as_granularity
from slimtune.sparsity.prune import prune
from slimtune.testing import tiny


@settings(deadline=None)
@given(some.lists(some.lists(some.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=3),
       some.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]))
def test_n_of_each_m_live(values, nm):
    n, m = nm
    keep = NM(n=n, m=m).keep(torch.tensor(values, dtype=torch.float32))
    for r, start in itertools.product(range(len(values)), range(0, 8, m)):
        group, kept = values[r][start:start + m], keep[r, start:start + m].tolist()
        assert sum(kept) == n
        order = sorted(range(m), key=lambda i: (group[i], i))
        assert kept == [i in order[m - n:] for i in range(m)]


@pytest.mark.parametrize(("how", "of"), [("mean", lambda x: sum(x) / len(x)), ("sum", sum), ("max", max)])
def test_blocks_rows_columns(how, of):
    score = torch.rand(6, 8, dtype=torch.float64)
    blocks, rows, columns = (u.units(score, "w") for u in (Block(rows=3, columns=2, how=how), Row(how=how),
                                                           Column(how=how)))
    for i, j in itertools.product(range(2), range(4)):
        cells = [float(score[i * 3 + a, j * 2 + b]) for a in range(3) for b in range(2)]
        assert abs(float(blocks[i, j]) - of(cells)) < 1e-12
    assert all(abs(float(rows[i]) - of(score[i].tolist())) < 1e-12 for i in range(6))
    assert all(abs(float(columns[j]) - of(score[:, j].tolist())) < 1e-12 for j in range(8))
    assert abs(float(Whole(how=how).units(score, "w")) - of(score.flatten().tolist())) < 1e-12


def test_a_mask_of_units_is_one_of_weights():
    keep = torch.tensor([[True, False], [False, True]])
    full = Block(rows=2, columns=3).weights(keep, (4, 6))
    assert all(bool(full[i, j]) == bool(keep[i // 2, j // 3]) for i in range(4) for j in range(6))
    assert torch.equal(Row().weights(torch.tensor([True, False]), (2, 3)), torch.tensor([[True] * 3, [False] * 3]))
    assert torch.equal(Column().weights(torch.tensor([True, False]), (2, 2)), torch.tensor([[True, False]] * 2))
    assert Whole().weights(torch.tensor([False]), (2, 2)).tolist() == [[False, False], [False, False]]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_input_is_the_input_whatever_way_it_is_stored(family):
    delta = st.attach(tiny(family), st.methods.LoRA(rank=2))
    prune(delta, granularity="2:4", on="base")
    for mask in delta.masks.values():
        inputs = mask if family == "bert" else mask.mT  # Conv1D is (in, out)
        assert (inputs.reshape(-1, 4).sum(1) == 2).all()
    delta.set_masks({})
    found = prune(delta, 0.5, on="base", granularity=Row(), allocation="uniform", sites=("mlp.up",))
    for mask in delta.masks.values():
        rows = mask if family == "bert" else mask.mT
        assert ((rows.all(1)) | (~rows.any(1))).all()
        assert int(rows.all(1).sum()) == 32
    assert found.sparsity == 0.5


def test_ranks_go_with_both_their_halves():
    delta = st.attach(tiny("bert"), st.methods.LoRA(rank=4))
    with torch.no_grad():
        for name, p in delta.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    state = {n: t.clone() for n, t in delta.state().items()}
    slots = [n[:-2] for n in state if n.endswith(".A")]
    score = {(s, j): float(state[s + ".A"][j].abs().mean() + state[s + ".B"][:, j].abs().mean())
             for s in slots for j in range(4)}
    gone = sorted(score, key=lambda unit: score[unit])[:8]
    prune(delta, 0.5, granularity=Rank())
    for s, j in score:
        a, b = delta.masks[s + ".A"][j], delta.masks[s + ".B"][:, j]
        assert a.any() == a.all() == b.any() == b.all() == ((s, j) not in gone)


def test_what_does_not_fit_is_refused():
    delta = st.attach(tiny("bert"), st.methods.Pfeiffer(bottleneck=6))
    for granularity, words in (("4:4", "does not fit"), ("2:4", "6 inputs"),
                               (Block(rows=4, columns=4), "do not divide"),
                               ("rank", "neither A nor B"), ("blok", "Did you mean"), ({"name": "block"}, "rows")):
        with pytest.raises(MethodError, match=words):
            prune(delta, None if ":" in str(granularity) else 0.5, granularity=granularity)
        assert not delta.masks
    assert as_granularity({"name": "block", "rows": 2, "columns": 3}) == Block(rows=2, columns=3)
    assert as_granularity("1:4") == NM(n=1, m=4)


def test_n_of_m_by_name_takes_no_other_values():
    assert as_granularity({"name": "2:4"}) == NM(n=2, m=4)
    with pytest.raises(MethodError, match="rows"):
        as_granularity({"name": "2:4", "rows": 4})
