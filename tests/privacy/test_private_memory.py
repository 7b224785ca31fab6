"""Peak memory of a private step over the same plain step: at most the examples' gradients and a tenth."""
import ctypes
import gc
import multiprocessing
import sys

import pytest
import torch
from privacy_toys import ledger, step_of

import slimtune as st
from slimtune.train.memory import PeakMemory

ROWS, LENGTH, MMAP_THRESHOLD = 8, 64, -3


def model():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=3, hidden_size=256, intermediate_size=1024,
                                     num_attention_heads=4, vocab_size=2000, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config).train()


def peak(step) -> float:
    """Bytes above what is there: the least of four steps, for what else a process does only adds."""
    libc, found = ctypes.CDLL(None), []
    libc.mallopt(MMAP_THRESHOLD, 1 << 14)           # what is freed leaves the process
    for _ in range(4):
        gc.collect()
        libc.malloc_trim(0)
        memory = PeakMemory()
        step()
        found.append((memory.peak() - memory.start) * 2 ** 20)
    return min(found[1:])


def measure(private: bool, method, queue) -> None:
    delta = st.attach(model(), method)
    draw = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(5, 2000, (ROWS, LENGTH), generator=draw),
             "labels": torch.randint(0, 2, (ROWS,), generator=draw)}
    optimizer = torch.optim.SGD(delta.parameters(), lr=1e-3)
    step = step_of(delta, ledger(1.0), optimizer) if private else None

    def plain() -> None:
        delta.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def dp() -> None:
        assert step is not None
        step.begin()
        step.add(batch)
        step.finish(1, watch=False)
        optimizer.step()
        optimizer.zero_grad()

    queue.put((peak(dp if private else plain), sum(p.numel() for p in delta.parameters())))


def measured(private: bool, method) -> tuple[float, int]:
    """In a process of its own, whose memory nothing else has touched."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=measure, args=(private, method, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_a_delta_takes_its_examples_gradients_and_no_more():
    (plain, trained), (private, _) = (measured(kind, st.methods.LoRA(rank=16)) for kind in (False, True))
    assert private <= (plain + ROWS * trained * 4) * 1.1 + 2 ** 20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_full_fine_tuning_never_holds_a_gradient_for_each_example():
    (plain, trained), (private, _) = (measured(kind, st.methods.Full()) for kind in (False, True))
    assert private <= 1.4 * plain
    assert private < plain + ROWS * trained * 4 / 4, "far below a gradient an example"
