"""Robust tickets: gates against plain autograd, what is left behind, the paper's claim on a toy, drawing, rewinding."""
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from slimtune.core import attach, dissect
from slimtune.errors import DeltaError, RecipeError, TrainError
from slimtune.methods import Full
from slimtune.objectives import FreeLB, adversarial_backward
from slimtune.sparsity.hard_concrete import HardConcrete
from slimtune.sparsity.robust import TicketSpec, search, state_names, ticket
from slimtune.sparsity.weight_gates import WeightGates
from slimtune.testing import batch, tiny


def plain(model: nn.Module, data: dict[str, Tensor], around) -> float:
    return adversarial_backward(model, data, FreeLB(steps=1, start=0), around=around)


def paths_of(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(f"{site.path}.weight" for site in dissect(model).select(["linear"])))


class Masked(nn.Module):
    """What the gates must agree with: W' as a function of log_alpha, for autograd to go through."""

    def __init__(self, log_alpha: nn.Parameter, draw, spread) -> None:
        super().__init__()
        self.log_alpha, self.draw, self.spread = log_alpha, draw, spread

    def forward(self, weight: Tensor) -> Tensor:
        return self.spread(self.draw(self.log_alpha)) * weight


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize(("rows", "columns", "compat"), [(1, 1, "paper"), (4, 8, "paper"), (4, 8, "official")])
def test_the_gates_gradients_are_those_of_a_parametrised_model(family: str, rows: int, columns: int, compat):
    model, data, law = tiny(family).double(), batch(family), HardConcrete()
    gates = WeightGates(model, paths_of(model), rows=rows, columns=columns, compat=compat,
                        generator=torch.Generator().manual_seed(5))
    with gates.open():
        for _ in range(2):  # gradients add up over passes
            with gates.sampled():
                model(**data).loss.backward()

    twin, generator = tiny(family).double(), torch.Generator().manual_seed(5)
    own = {path: nn.Parameter(log_alpha.detach().clone()) for path, log_alpha in gates.log_alpha.items()}
    drawn = {id(p): p for p in own.values()}
    for path, parameter in own.items():
        module = twin.get_submodule(path.removesuffix(".weight"))
        masked = Masked(parameter, lambda p: drawn[id(p)], block(rows, columns, compat))
        register_parametrization(module, "weight", masked)
    for _ in range(2):
        drawn |= {id(p): law.sample(p, generator) for p in own.values()}
        twin(**data).loss.backward()
    for path, parameter in own.items():
        torch.testing.assert_close(gates.log_alpha[path].grad, parameter.grad, rtol=1e-9, atol=1e-15)


def block(rows: int, columns: int, compat: str):
    """From gates to weights by index: i // rows in a block, i % (R / rows) as the code tiles them."""
    def spread(gates: Tensor) -> Tensor:
        i, j = torch.arange(gates.shape[0] * rows), torch.arange(gates.shape[1] * columns)
        if compat == "official":
            return gates[(i % gates.shape[0])[:, None], (j % gates.shape[1])[None]]
        return gates[(i // rows)[:, None], (j // columns)[None]]
    return spread


def test_a_search_leaves_weights_gradients_modes_and_what_trains_as_they_were():
    model, data = tiny("bert", dropout=True), batch("bert")
    model.classifier.bias.grad = torch.ones(3)
    model.bert.embeddings.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    for compat in ("paper", "official"):
        gates = search(model, paths_of(model), [data] * 4, plain, TicketSpec(steps=3, compat=compat))
        assert all((a - 1.609438).abs().max() > 0.01 for a in gates.scores().values())
    with pytest.raises(TrainError, match="after step 2 of 3"):
        search(model, paths_of(model), [data] * 2, plain, TicketSpec(steps=3))
    with pytest.raises(TrainError, match="step 1: the loss of the search is nan"):
        search(model, paths_of(model), [data], lambda *_: math.nan, TicketSpec(steps=1))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert (p.grad is None) == (name != "classifier.bias")
    assert not model.training


def test_the_penalty_is_the_mean_over_gates_and_officially_that_of_the_matrices():
    uneven = nn.ModuleDict({"a": nn.Linear(12, 2), "b": nn.Linear(2, 4)})
    for compat, expected in (("paper", (24 * 0.831822 + 8 * 0.973367) / 32), ("official", (0.831822 + 0.973367) / 2)):
        gates = WeightGates(uneven, ["a.weight", "b.weight"], compat=compat)
        with torch.no_grad():
            gates.log_alpha["a.weight"].fill_(0.0)
            gates.log_alpha["b.weight"].fill_(2.0)
        assert float(gates.penalty().detach()) == pytest.approx(expected, abs=1e-6)


def test_the_official_clip_goes_over_gradients_that_nobody_sets_to_0():
    """Two passes: the gates' gradients are cleared between them, those of weights and biases add up."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2)}).double()
    gates = WeightGates(model, ["a.weight"], compat="official", generator=torch.Generator().manual_seed(0))
    twin = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    x, shadow = torch.ones(1, 3, dtype=torch.float64), model["a"].weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    with gates.open():
        for _ in range(2):
            gates.log_alpha["a.weight"].grad = None
            with gates.sampled():
                model["a"](x).sum().backward()
            log_alpha = gates.log_alpha["a.weight"].detach().clone().requires_grad_()
            z = gates.law.sample(log_alpha, generator)
            (z * shadow).sum().backward()
            twin[0] += z.detach()
            twin[1] += 1
        expected = torch.sqrt(twin[0].square().sum() + twin[1].square().sum() + log_alpha.grad.square().sum())
        assert gates.clip(0.5) == pytest.approx(float(expected))
        torch.testing.assert_close(gates.log_alpha["a.weight"].grad, log_alpha.grad * 0.5 / (expected + 1e-6))
    plain_gates = WeightGates(model, ["a.weight"])
    plain_gates.log_alpha["a.weight"].grad = torch.full((2, 3), 2.0, dtype=torch.float64)
    assert plain_gates.clip(1.0) == pytest.approx(math.sqrt(24))


def test_the_schedules():
    paper, official = TicketSpec(steps=1000, strength=0.5), TicketSpec(steps=1000, strength=0.5, compat="official")
    assert [paper.strength_at(s) for s in (100, 250, 400, 1000)] == [0, 0.25, 0.5, 0.5]
    assert [official.strength_at(s) for s in (33, 134)] == [0, 0.5]  # 3.3 % and 13.3 %
    assert official.strength_at(34) > 0
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    from transformers import get_linear_schedule_with_warmup

    schedule = get_linear_schedule_with_warmup(reference, 100, 1000)
    for step in range(1, 1001):
        assert paper.rate_at(step) == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()
    with pytest.raises(RecipeError):
        TicketSpec(steps=0)


class Toy(nn.Module):
    """A linear classifier on four robust features and four fragile ones, given as the embedding of a token."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(features)
        self.linear = nn.Linear(8, 1, bias=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        margin = batch["labels"] * self.linear(self.words(batch["input_ids"])[:, 0])[:, 0]
        return nn.functional.softplus(-margin).mean()


@pytest.mark.parametrize(("adversary", "keeps"), [(FreeLB(steps=3, rate=0.4, start=0.05), "robust"),
                                                 (FreeLB(steps=1, start=0), "fragile")])
def test_a_ticket_against_an_adversary_keeps_the_robust_features(adversary: FreeLB, keeps: str):
    """Robust: 1 in size, right nine times of ten. Fragile: 0.15 in size and always right, with the larger weights; a
    step of 0.4 turns it round. Magnitude keeps the fragile half, and so does a search without an adversary."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(512, generator=generator) < 0.5, 1.0, -1.0)
    right = torch.where(torch.rand(512, 4, generator=generator) < 0.9, 1.0, -1.0)
    features = torch.cat([labels[:, None] * right, 0.15 * labels[:, None].expand(-1, 4)], 1)
    model = Toy(features)
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[1.0] * 4 + [8.0] * 4]))
    data = {"input_ids": torch.arange(512)[:, None], "labels": labels}

    def backward(model: nn.Module, batch: dict[str, Tensor], around) -> float:
        return adversarial_backward(model, batch, adversary, generator=generator, embed=model.words,
                                    loss=lambda m, b: m.loss(b), around=around)

    gates = search(model, ["linear.weight"], [data] * 150, backward, TicketSpec(steps=150, strength=0.5))
    kept = ticket(gates, 0.5)["linear.weight"][0]
    assert kept.tolist() == [keeps == "robust"] * 4 + [keeps == "fragile"] * 4
    magnitude = model.linear.weight[0].detach().abs().topk(4).indices
    assert sorted(magnitude.tolist()) == [4, 5, 6, 7]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_a_ticket_has_exactly_k_zeros_of_all_and_the_lowest(sparsity: float):
    model = tiny("bert")
    gates = WeightGates(model, paths_of(model))
    with torch.no_grad():
        for a in gates.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel())).mul_(40).round_())
    masks = ticket(gates, sparsity)
    flat, kept = (torch.cat([t.flatten() for t in source.values()]) for source in (gates.scores(), masks))
    assert int((~kept).sum()) == math.floor(sparsity * flat.numel())
    if sparsity:
        assert flat[~kept].max() <= flat[kept].min()


def test_coarse_tickets_drop_whole_blocks():
    model = tiny("bert")
    gates = WeightGates(model, paths_of(model)[:2], rows=8, columns=32)
    with torch.no_grad():
        gates.log_alpha["bert.encoder.layer.0.attention.self.query.weight"][1] = -3
    mask = ticket(gates, 1 / 8)["bert.encoder.layer.0.attention.self.query.weight"]
    assert [bool(rows.any()) for rows in mask.split(8)] == [True, False, True, True]


def test_a_ticket_is_rewound_to_the_pretrained_weights_bit_for_bit():
    model, data = tiny("bert"), batch("bert")
    origin = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = attach(model, Full())
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
    model(**data).loss.backward()
    optimizer.step()
    paths = paths_of(model)
    assert not torch.equal(model.get_parameter(paths[0]), origin[paths[0]])
    masks = ticket(search(model, paths, [data] * 3, plain, TicketSpec(steps=3)), 0.3)
    tuned.detach()
    delta = attach(model, Full())
    delta.set_masks(state_names(masks))
    for name, p in model.named_parameters():
        if name in masks:
            assert torch.equal(p[masks[name]], origin[name][masks[name]])
            assert not p[~masks[name]].any()
        else:
            assert torch.equal(p, origin[name])


def test_what_cannot_be_gated_is_refused():
    model = tiny("bert")
    with pytest.raises(DeltaError, match="Did you mean"):
        WeightGates(model, ["bert.encoder.layer.0.attention.self.query.weigth"])
    with pytest.raises(DeltaError, match="matrices"):
        WeightGates(model, ["classifier.bias"])
    with pytest.raises(RecipeError, match="blocks of 5 x 1"):
        WeightGates(model, ["bert.encoder.layer.0.attention.self.query.weight"], rows=5)
    gates = WeightGates(model, ["bert.encoder.layer.0.attention.self.query.weight"])
    with gates.open(), pytest.raises(DeltaError, match="no gradient"), gates.sampled():
        pass
