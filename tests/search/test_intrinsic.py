"""Local intrinsic dimension: a toy whose dimension is known, and what a search does to a model: nothing."""
import pytest
import torch

import slimtune as st
from slimtune.core.fingerprint import bits_digest
from slimtune.core.projection import project
from slimtune.errors import SiteError, SlimtuneError
from slimtune.search.intrinsic import Measured, Part, Search, Trials, lowest, measure, parts, ranked, together
from slimtune.testing import tiny
from slimtune.train import TrainSpec, logits

NUMBERS = 500


def fitted(k: int, d: int, seed: int = 0) -> float:
    """R^2 of least squares in a random subspace of d numbers, where the solutions have codimension k.

    y = X w for k examples: k equations in 500 weights, so that the solutions are all that differ by X's kernel.
    """
    draw = torch.Generator().manual_seed(seed)
    X, w = (torch.randn(*shape, generator=draw, dtype=torch.double) for shape in ((k, NUMBERS), (NUMBERS,)))
    P = torch.stack([project(axis, seed, NUMBERS, 0, NUMBERS) for axis in torch.eye(d, dtype=torch.double)], -1)
    y = X @ w
    theta = torch.linalg.lstsq(X @ P, y[:, None]).solution
    return 1 - float((X @ P @ theta - y[:, None]).square().sum() / y.square().sum())


@pytest.mark.parametrize("k", [6, 20, 50])
def test_the_dimension_of_a_toy_is_found(k: int):
    """k numbers are needed to solve it, and 0.9 k, about, for nine tenths of it."""
    part = Part("toy", ("toy",), NUMBERS)
    solved = measure(part, lambda part, d: fitted(k, d), 0.0, Search(1 - 1e-6, start=1, bisections=20), True)
    assert solved.dimension == k
    nearly = measure(part, lambda part, d: fitted(k, d), 0.0, Search(0.9, start=1, bisections=20), True)
    assert 0.75 * k <= nearly.dimension <= k
    assert nearly.full == pytest.approx(1.0)
    assert nearly.target == pytest.approx(0.9)


def test_more_numbers_score_more():
    """d random directions of k explain d / k, as those of a dense projection do."""
    sizes = (1, 2, 4, 8, 16, 20, 40)
    found = [sum(fitted(20, d, seed) for seed in range(30)) / 30 for d in sizes]
    assert found == sorted(found)
    assert found == pytest.approx([min(d / 20, 1.0) for d in sizes], abs=0.05)


def test_a_share_of_the_gain_starts_at_the_head():
    part, asked = Part("q", ("q",), 100), []

    def score(part: Part, d: int) -> float:
        asked.append(d)
        return min(0.5 + d / 100, 0.9)

    found = measure(part, score, 0.5, Search(0.5, "gain", start=4, bisections=9), True)
    assert (found.full, found.target, found.dimension) == (0.9, pytest.approx(0.7), 20)
    assert asked[0] == 100
    assert 0 not in asked  # the head's score is known
    assert measure(part, score, 0.85, Search(0.9, "score"), True).dimension == 0
    assert measure(part, lambda part, d: 1.0 if d == 100 else 0.0, 0.0, Search(most=64), True).dimension is None
    falling = measure(part, lambda part, d: 2.0 - min(d, 50) / 50, 2.0, Search(0.5, "gain", "part", 1, 64, 9), False)
    assert (falling.target, falling.dimension) == (1.5, 25)
    with pytest.raises(SlimtuneError, match="--of gain"):
        measure(part, score, 0.5, Search(of="score"), False)


def test_full_tuning_is_not_trained_twice():
    asked = []
    measure(Part("q", ("q",), 64), lambda part, d: asked.append(d) or float(d == 64), 0.0, Search(start=16), True)
    assert sorted(asked) == [16, 32, 48, 56, 64]


def test_full_tuning_of_the_run_may_be_the_measure():
    part, asked, search = Part("q", ("q",), 64), [], Search(0.5, against="run", start=16, bisections=0)
    found = measure(part, lambda part, d: asked.append(d) or d / 100, 0.0, search, True, 1.0)
    assert (found.full, found.target, found.dimension, asked) == (1.0, 0.5, 64, [16, 32, 64])
    assert search.tries(part) == len(asked)
    anatomy = st.dissect(tiny("bert"))
    whole = together(anatomy, parts(anatomy, ["attn.q", "attn.?", "mlp.up"]))
    assert (whole.sites, whole.numbers) == (("attn.q", "attn.?", "mlp.up"), 2 * (4 * 32 * 32 + 32 * 64))
    names = {together(anatomy, parts(anatomy, ["attn.?", "mlp.up", *more], per_block=True)).name
             for more in ((), ("mlp.down",))}
    assert len(names) == 2
    assert max(map(len, names)) <= 100


def test_parts_are_roles_or_single_sites():
    anatomy = st.dissect(tiny("t5"))
    q = 32 * 32
    assert parts(anatomy, ["attn.q", "mlp.up"]) == [Part("attn.q", ("attn.q",), 6 * q),
                                                    Part("mlp.up", ("mlp.up",), 4 * 2 * q)]
    single = parts(anatomy, ["cross.attn.?"], per_block=True)
    assert [p.name for p in single] == [f"decoder.{b}.cross.attn.{r}" for b in (0, 1) for r in "qkvo"]
    assert {p.numbers for p in single} == {q}
    with pytest.raises(SiteError, match=r"'norm.\*' is no weight of a linear map: norm.attn"):
        parts(anatomy, ["norm.*"])
    with pytest.raises(SiteError, match=r"It has: attn\.q"):
        parts(anatomy, ["attn.z"])


def test_the_lowest_are_proposed():
    found = [Measured(Part(n, (n,), 1), 1.0, 0.9, d, {}) for n, d in
             {"a": 64, "b": None, "c": 30, "d": 61, "e": 60}.items()]
    assert [m.part.name for m in ranked(found)] == ["c", "e", "d", "a", "b"]
    assert [p.name for p in lowest(found)] == ["c", "e"]
    assert lowest([Measured(Part("a", ("a",), 1), 1.0, 0.9, None, {})]) == []
    assert lowest([Measured(Part("a", ("a",), 1), 1.0, 0.9, 0, {})]) == []


def test_a_training_is_of_the_part_alone_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = tiny("bert")
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 99, (6,), generator=draw).tolist(), "labels": i % 3} for i in range(12)]

    def collate(batch):
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    def accuracy(guess, truth):
        return {"accuracy": float((guess.argmax(-1) == truth).float().mean())}

    spec = TrainSpec(steps=2, batch_size=4, learning_rate=1e-3, head_learning_rate=0.1, eval_every=2, threads=1)
    trials = Trials(model, rows, rows, collate, accuracy, logits, "accuracy", spec, tmp_path, seed=3)
    part, seen = Part("attn.q", ("attn.q",), 2048), []
    from slimtune.search import intrinsic

    def spy(delta, *args, **options):
        seen.append((delta.count(), [m.seed for m in delta.methods if hasattr(m, "seed")], args[4]))
        return real(delta, *args, **options)

    real = intrinsic.fit
    monkeypatch.setattr(intrinsic, "fit", spy)
    before, keys = bits_digest(model), list(model.state_dict())
    scores = [trials.head(), trials.part(part, 8), trials.part(part, 2048)]
    assert (bits_digest(model), list(model.state_dict())) == (before, keys)
    assert all(0 <= s <= 1 for s in scores)
    assert [count.adapter for count, _, _ in seen] == [0, 8, 2048]
    assert [count.head for count, _, _ in seen] == [99] * 3
    assert [seeds for _, seeds, _ in seen] == [[], [3], [3]]
    assert [s.learning_rate for _, _, s in seen] == pytest.approx([1e-3, 1e-3 * 16, 1e-3])
    assert [s.head_learning_rate for _, _, s in seen] == [0.1] * 3
    again = Trials(tiny("bert"), rows, rows, collate, accuracy, logits, "loss", spec, tmp_path / "again", seed=3)
    assert not again.higher
    assert again.part(part, 8) == again.part(part, 8)
