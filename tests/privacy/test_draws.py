"""Poisson draws and their secret."""
import math

import torch

from slimtune.privacy.draws import new_secret, poisson, rekey


def test_each_example_is_drawn_by_itself_at_the_rate():
    examples, rate, steps = 50, 0.1, 2000
    drawn = torch.zeros(steps, examples)
    for step in range(steps):
        drawn[step, poisson(new_secret(3), step, examples, rate)] = 1
    error = math.sqrt(rate * (1 - rate) / steps)
    assert float((drawn.mean(0) - rate).abs().max()) < 4.5 * error          # each example
    sizes = drawn.sum(1)
    assert abs(float(sizes.mean()) - examples * rate) < 5 * math.sqrt(examples * rate * (1 - rate) / steps)
    assert abs(float(sizes.var()) / (examples * rate * (1 - rate)) - 1) < 5 * math.sqrt(2 / steps)   # not fixed
    assert float(torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(steps)
    assert (sizes == 0).any(), "a step may draw none"


def test_secrets_are_new_and_whole():
    assert not torch.equal(new_secret(None), new_secret(None))
    assert torch.equal(new_secret(1), new_secret(1))
    secret = new_secret(1)
    other = secret.clone()
    other[31] ^= 1                                                          # the last bit counts
    assert poisson(secret, 1, 1000, 0.5) != poisson(other, 1, 1000, 0.5)


def test_the_whole_state_is_keyed():
    """All 624 words of the twister differ from those of a 32-bit seed, and draws are uniform."""
    generator, seeded = torch.Generator(), torch.Generator().manual_seed(0)
    rekey(generator, new_secret(0), "a")
    words = [g.get_state()[24:24 + 8 * 624].view(torch.int64) for g in (generator, seeded)]
    assert int((words[0] != words[1]).sum()) == 624
    assert int(words[0].max()) < 2 ** 32
    draws = torch.rand(20_000, generator=generator)
    assert abs(float(draws.mean()) - 0.5) < 5 / math.sqrt(12 * 20_000)
    again = torch.Generator()
    again.manual_seed(77)
    torch.rand(3, generator=again)
    rekey(again, new_secret(0), "a")
    assert torch.equal(torch.rand(20_000, generator=again), draws)
