"""Two processes that share a step: each clips its own examples, and there is one noise."""
import multiprocessing
import os

import pytest
import torch
from privacy_toys import delta_of, ledger, part, same, step_of, texts

import slimtune as st
from slimtune.privacy.draws import new_secret
from slimtune.privacy.step import PrivateStep

COUNT, STEPS = 5, 3


def book(clipping: str, sigma: float):
    return ledger(sigma, clip=0.05, clipping=clipping, **({"count_noise": 1.0} if clipping == "adaptive" else {}))


def steps(step: PrivateStep, rows_of) -> dict[str, torch.Tensor]:
    found = {}
    for number in range(1, STEPS + 1):
        step.begin()
        for rows in rows_of(number):
            step.add(part(texts(COUNT, seed=number), rows))
        step.finish(number)
        found |= {f"{number}/{n}": p.grad.clone() for n, p in step.named.items()}
        found[f"{number}/clip"] = torch.tensor(step.clip)
    return found


def work(rank: int, folder: str, clipping: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    delta = delta_of("bert", st.methods.LoRA(rank=2))
    step = PrivateStep(delta, torch.optim.SGD(delta.parameters(), lr=1.0), book(clipping, 1.0), new_secret(rank),
                       group=torch.distributed.group.WORLD)
    rows = {1: [[0, 2, 4], [1, 3]], 2: [[0, 1, 2, 3, 4], []], 3: [[0], [1, 2, 3, 4]]}    # in the second one has none
    found = steps(step, lambda number: [rows[number][rank]] if rows[number][rank] else [])
    torch.save({"grads": found, "secret": step.secret, "spent": step.ledger.steps}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_two_ranks_take_the_step_of_one(tmp_path, clipping):
    """The whole batch in one process, with the first rank's secret: the same clipped sum and the same single noise."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, os.fspath(tmp_path), clipping)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(found[0]["secret"], new_secret(0))
    assert torch.equal(found[1]["secret"], new_secret(0))
    for name, grad in found[0]["grads"].items():
        assert torch.equal(grad, found[1]["grads"][name]), name
    alone = step_of(delta_of("bert", st.methods.LoRA(rank=2)), book(clipping, 1.0))
    same(found[0]["grads"], steps(alone, lambda _: [list(range(COUNT))]))
    assert found[0]["spent"] == found[1]["spent"] == alone.ledger.steps == STEPS
