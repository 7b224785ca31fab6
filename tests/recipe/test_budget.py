"""--budget: what is accepted, and that no larger setting would have fitted, by trying them all."""
import random

import pytest
import torch
from pydantic import Field, create_model

from slimtune.core import Add, Count, dissect, zeros
from slimtune.errors import MethodError, SlimtuneError
from slimtune.methods import get, registered
from slimtune.recipe.budget import Budget, propose, search, size_fields, trained
from slimtune.recipe.catalogue import count_of
from slimtune.testing import tiny


@pytest.fixture(scope="module")
def net():
    return tiny("bert").to("meta")


@pytest.mark.parametrize(("text", "numbers"), [
    ("0.1%", 22_713), ("100%", 22_713_216), (".5 %", 113_566), ("50k", 50_000), ("1.5M", 1_500_000),
    ("300_000", 300_000), ("300,000", 300_000), ("1", 1), (" 2K ", 2_000), ("1.2345k", 1_234)])
def test_a_budget_is_a_share_or_a_number(text: str, numbers: int):
    assert Budget.parse(text).of(22_713_216) == numbers


@pytest.mark.parametrize("text", ["abc", "", "0%", "0", "-1", "-1%", "101%", "0.5", "nan", "inf", "1e6", "k", "%",
                                  "1%%", "1 000", "5x", "\uff11%"])
def test_no_budget_is_an_error_that_says_what_is_accepted(text: str):
    with pytest.raises(SlimtuneError, match=r"(?s)not a budget.*0\.1%.*300_000, 50k or 1\.5M") as caught:
        Budget.parse(text)
    assert caught.value.exit_code == 2


def possible_values(rng: random.Random) -> set[int]:
    step, width = rng.choice([1, 1, 2, 3, 4, 12]), rng.choice([64, 96, 384, 768])
    divisors = {v for v in range(1, width + 1) if width % v == 0}
    return rng.choice([{*range(step, 3_000, step)}, divisors, {*range(step, rng.randint(20, 500), step)}])


@pytest.mark.parametrize("seed", range(60))
def test_search_finds_what_trying_all_values_finds(seed: int):
    rng = random.Random(seed)
    possible, scale = possible_values(rng), rng.randint(1, 50)
    growing = rng.random() < 0.5
    offset = rng.choice([0, 100])
    counts = {v: offset + scale * v if growing else offset + scale * 5_000 // v for v in possible}
    start = rng.choice(sorted(possible)[:8])
    limit = rng.choice([*counts.values(), 0, 1, 150, 10**6]) + rng.choice([-1, 0, 1])
    value, fits = search(lambda v: counts.get(v), start, limit)
    within = [c for c in counts.values() if c <= limit]
    assert (counts[value], fits) == ((max(within), True) if within else (min(counts.values()), False))


@pytest.mark.parametrize("limit", [300, 5_000])
@pytest.mark.parametrize("name", registered())
def test_a_proposal_is_the_largest_that_fits(net, name: str, limit: int):
    cls, anatomy = get(name), dissect(net)
    found = propose(name, cls, net, limit)
    if found.count is None:
        assert isinstance(count_of(net, cls, anatomy), Exception)
        return
    assert (trained(found.count) <= limit) is found.fits
    assert count_of(net, cls, anatomy, **found.setting) == found.count
    for field, value in list(found.setting.items())[-1:]:  # the one that was searched
        near = {*range(1, 13), *range(max(value - 6, 1), value + 7), 16, 32, 64, 2 * value} - {value}
        tried = (count_of(net, cls, anatomy, **found.setting | {field: v}) for v in near)
        others = [trained(c) for c in tried if isinstance(c, Count)]
        if not found.fits:
            assert min(others) >= trained(found.count)
        elif not found.note:  # nothing else bounds it
            assert not [c for c in others if trained(found.count) < c <= limit]


def test_the_model_is_left_as_it_was(net):
    before = {name: id(p) for name, p in net.named_parameters()}
    for name, cls in registered().items():
        propose(name, cls, net, 1_000)
    assert {name: id(p) for name, p in net.named_parameters()} == before
    assert not [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]


class Bands(Add):
    """A size that must divide by three, a second size, and integers that are no sizes."""

    sites: tuple[str, ...] = ("mlp",)
    seed: int = 1
    heads: int = 2
    extra: int = 5
    bottleneck: int = 3

    def params(self, site):
        if self.bottleneck % 3:
            raise MethodError("not three")
        return {"b": zeros(self.bottleneck, 10), "c": zeros(self.extra)}

    def forward(self, p, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


def bands() -> type[Bands]:
    fields = {name: (int, Field(Bands.model_fields[name].default, ge=1))
              for name in ("heads", "extra", "bottleneck")}
    return create_model("Toy", __base__=Bands, **fields)


def test_the_size_is_found_from_the_schema(net):
    cls = bands()
    assert size_fields(Bands) == []
    assert size_fields(cls) == ["bottleneck", "heads", "extra"]
    # two blocks of 10 m + 5
    assert propose("toy", cls, net, 200).override == "method={name: toy, bottleneck: 9}"
    least = propose("toy", cls, net, 30)
    assert (least.fits, least.setting, least.count and least.count.adapter) == (False, {"bottleneck": 3}, 70)
    assert least.note == "the least, at bottleneck: 3 with extra kept at 5"


def test_a_prompt_leaves_half_of_the_positions_to_the_text(net):
    found = propose("prompt_tuning", get("prompt_tuning"), net, 10**6)
    assert found.setting == {"length": net.config.max_position_embeddings // 2}
    assert "half of the" in found.note


def test_a_size_ends_where_it_adds_no_numbers(net):
    class Ends(bands()):
        def params(self, site):
            return {"b": zeros(min(self.bottleneck, 21), 10)}

    found = propose("ends", Ends, net, 10**6)
    assert (found.setting, found.note) == ({"bottleneck": 21}, "more bottleneck adds no numbers")
    widest = propose("lora", get("lora"), net, 10**9)
    assert (widest.setting, widest.note) == ({"rank": 64}, "no more than the width of the widest layer")


def test_what_cannot_go_and_what_has_no_size_say_so(net):
    assert propose("ia3", get("ia3"), net, 10).note == "it has no size to set"
    gate = type("Gate", (get("lora"),), {"__annotations__": {"sites": tuple[str, ...]}, "sites": ("mlp.gate",)})
    refused = propose("gate", gate, net, 10**6)
    assert (refused.count, refused.fits) == (None, False)
    assert "mlp.gate" in refused.note
