"""What went wrong elsewhere where many tasks share a backbone, each as a test.

vLLM #47724: a request in flight was answered by an adapter that was added meanwhile. vLLM #18372: loading from a path
that does not exist looked like success. LoRAX: an adapter of another base is served where the architectures agree.
PEFT #2090: a misspelled name ran the plain model (also test_route.py::test_refusals). PEFT #1960: the head of another
task. PEFT: adding and loading take longer with each adapter. Other bases and damaged files: test_load.py. Runs that
train nothing: tests/train/test_delta_callback.py.
"""
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, get_ident

import pytest
import torch
from route_toys import moved

import slimtune as st
from slimtune.core import attach
from slimtune.core.insert import CHILD
from slimtune.core.route import route
from slimtune.errors import DeltaError
from slimtune.methods import get
from slimtune.testing import batch, tiny

INPUTS = batch("bert", labels=False)


def in_flight(model, tasks: list, meanwhile: Callable[[], object]) -> torch.Tensor:
    """The answer of a routed call in another thread, during which something happens, between its two blocks."""
    there, go = Event(), Event()
    runner = []

    def wait(module, args) -> None:
        if get_ident() in runner:
            there.set()
            assert go.wait(30)

    def call() -> torch.Tensor:
        runner.append(get_ident())
        with torch.no_grad(), route(model, tasks):
            return model(**INPUTS).logits

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            assert there.wait(30)
            meanwhile()
        finally:
            go.set()
            answer = future.result()
            handle.remove()
    assert not getattr(model._modules.get(CHILD), "leaving", None)
    return answer


def model_with_a(kind: str = "lora"):
    model = tiny("bert")
    moved(model, small(kind), "a", 1)
    moved(model, get("linear_probe")(), "head", 2)
    return model


def small(kind: str):
    return {"lora": get("lora")(rank=2), "prefix_tuning": get("prefix_tuning")(length=2)}.get(kind) or get(kind)()


def replaced(model, kind: str) -> None:
    st.deltas(model)["a"].detach()
    moved(model, small(kind), "a", 3)


EVENTS = {
    "another is added": lambda model: moved(model, get("lora")(rank=2), "b", 3),
    "another trains the backbone": lambda model: moved(model, get("bitfit")(), "b", 3),
    "another is added all over": lambda model: moved(model, get("full")(), "b", 3),
    "it is replaced": lambda model: replaced(model, "lora"),
    "it is replaced by another method": lambda model: replaced(model, "ia3"),
    "it is removed": lambda model: st.deltas(model)["a"].detach(),
    "another runs": lambda model: st.activate(model, "head"),
    "none runs": lambda model: st.activate(model),
    "all are removed": lambda model: [d.detach() for d in st.deltas(model).values()],
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", ["lora", "bitfit", "prefix_tuning"])
def test_an_answer_in_flight_is_its_own(kind: str, event: str):
    """vLLM #47724."""
    model = model_with_a(kind)
    tasks = ["a", "a", "a"] if kind == "prefix_tuning" else ["a", "head", None]
    with torch.no_grad(), route(model, tasks):
        wanted = model(**INPUTS).logits
    got = in_flight(model, tasks, lambda: EVENTS[event](model))
    assert torch.equal(got, wanted)
    if not st.deltas(model):
        assert CHILD not in model._modules
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_a_merge_waits_for_the_answers_in_flight():
    model = model_with_a()
    st.activate(model, "a")

    def merge() -> None:
        with pytest.raises(DeltaError, match="a route is open"):
            st.deltas(model)["a"].merge()

    with torch.no_grad(), route(model, ["head"] * 3):
        wanted = model(**INPUTS).logits
    assert torch.equal(in_flight(model, ["head"] * 3, merge), wanted)
    st.deltas(model)["a"].merge()


def test_what_does_not_load_is_not_there(tmp_path: Path):
    """vLLM #18372; and a damaged file is seen before anybody can ask for the task."""
    model = model_with_a()
    st.deltas(model)["a"].save(tmp_path / "b")
    file = tmp_path / "b" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with torch.no_grad(), route(model, ["a", "head", None]):
        wanted = model(**INPUTS).logits

    def load() -> None:
        for folder in (tmp_path / "no such folder", tmp_path / "b"):
            with pytest.raises(DeltaError):
                st.load(model, folder, name="b")

    assert torch.equal(in_flight(model, ["a", "head", None], load), wanted)
    assert set(st.deltas(model)) == {"a", "head"}
    with pytest.raises(DeltaError, match="no delta named 'b'"), route(model, ["b"] * 3):
        pass


@pytest.mark.parametrize("name", ["", "A", "aa", "head "])
def test_a_name_that_is_not_there_never_runs_the_plain_model(name: str):
    """PEFT #2090."""
    model = model_with_a()
    with pytest.raises(DeltaError, match="no delta named"), route(model, ["a", name, "head"]):
        pass
    assert not model._modules[CHILD].plan.routes


def test_every_task_has_its_own_head():
    """PEFT #1960: tasks that differ in their heads alone, whichever delta was added last or runs."""
    model = tiny("bert")
    for seed, name in enumerate("abc"):
        moved(model, get("linear_probe")(), name, seed)
    with torch.no_grad():
        features = model.bert(**INPUTS).pooler_output
    tasks = ["c", "a", None]
    for active in ("a", "b", None):
        st.activate(model, *([active] if active else []))
        with torch.no_grad(), route(model, tasks):
            logits = model(**INPUTS).logits
        for row, task in enumerate(tasks):
            held = st.deltas(model)[task].state() if task else {
                "head.classifier.weight": st.deltas(model)["a"].owned[0].base,
                "head.classifier.bias": st.deltas(model)["a"].owned[1].base}
            wanted = held["head.classifier.weight"] @ features[row] + held["head.classifier.bias"]
            torch.testing.assert_close(logits[row], wanted)


def test_identity_is_content_not_name(tmp_path: Path):
    model = model_with_a()
    a = st.deltas(model)["a"]
    a.save(tmp_path / "a")
    again = st.load(model, tmp_path / "a", name="b")
    assert a.digest() == again.digest() != st.deltas(model)["head"].digest()
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-6
    assert a.digest() != again.digest()
    other = attach(model, get("lora")(rank=2, alpha=1.0), name="c", state=a.state())
    assert a.digest() != other.digest()


def test_adding_and_removing_a_delta_cost_what_it_holds(tmp_path: Path):
    """Calls of functions, counted: as many with forty deltas attached as with one."""
    model = tiny("bert")
    attach(model, get("lora")(rank=2), name="first").save(tmp_path / "lora")

    def calls(run) -> int:
        number = 0

        def count(frame, event, argument) -> None:
            nonlocal number
            number += event == "call"

        sys.setprofile(count)
        try:
            run()
        finally:
            sys.setprofile(None)
        return number

    def once(name: str) -> tuple[int, int]:
        added = calls(lambda: st.load(model, tmp_path / "lora", name=name))
        return added, calls(st.deltas(model)[name].detach)

    once("warm")
    few = once("one")
    for i in range(40):
        st.load(model, tmp_path / "lora", name=f"t{i}")
    many = once("another")
    assert all(b <= 1.1 * a for a, b in zip(few, many, strict=True)), (few, many)
