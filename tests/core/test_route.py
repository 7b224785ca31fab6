"""route against solo runs: each example of a mixed batch gets what its own delta gives it alone."""
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from route_toys import moved

import slimtune as st
from slimtune.core import attach
from slimtune.core.insert import CHILD
from slimtune.core.route import route
from slimtune.errors import DeltaError, MethodError
from slimtune.methods import get, names
from slimtune.testing import batch, doubled, output, small, tiny

FAMILIES = ("bert", "gpt2", "t5", "llama", "vit")
MIXED = ["a", "b", "a"]


def inputs_of(family: str):
    return doubled(batch(family))


def solo(model, inputs, tasks):
    """Every task's output on the whole batch, alone."""
    found = {}
    for task in dict.fromkeys(tasks):
        st.activate(model, *([task] if task is not None else []))
        with torch.no_grad():
            found[task] = output(model, inputs)
    return found


def assert_routed(model, inputs, tasks, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    alone = solo(model, inputs, tasks)
    with torch.no_grad(), route(model, tasks):
        mixed = output(model, inputs)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(mixed[row], alone[task][row], rtol=rtol, atol=atol)
    assert any(not torch.equal(alone[t], alone[u]) for t in alone for u in alone)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", names())
def test_every_method(name: str, family: str):
    model, inputs = tiny(family).double().eval(), inputs_of(family)
    try:
        for seed, task in enumerate("ab"):
            moved(model, small(get(name)), task, seed)
    except st.SlimtuneError as refusal:
        pytest.skip(str(refusal))
    assert_routed(model, inputs, MIXED)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_methods_and_the_plain_backbone_in_one_batch(family: str):
    model, inputs = tiny(family).double().eval(), inputs_of(family)
    moved(model, get("lora")(rank=2), "a", 1)
    moved(model, [get("parallel_adapter")(bottleneck=3), get("ia3")()], "b", 2)
    moved(model, get("lora")(rank=5, sites=("mlp.down",)), "c", 3)
    assert_routed(model, inputs, ["b", None, "a"])
    assert_routed(model, inputs, ["c", "a", "b"])


@pytest.mark.parametrize("composition", ["concat", "gate", "add", "relu"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefixes_beside_other_methods_and_the_plain_backbone(attention: str, family: str, composition: str):
    model, inputs = tiny(family, attn_implementation=attention).double().eval(), inputs_of(family)
    moved(model, get("prefix_tuning")(length=2, composition=composition), "a", 1)
    moved(model, get("prefix_tuning")(length=3), "b", 2)
    moved(model, get("lora")(rank=2), "c", 3)
    rounding = (1e-9, 1e-10) if attention == "sdpa" else (1e-5, 1e-6)   # eager attention's softmax is in float32
    assert_routed(model, inputs, ["b", None, "a"], *rounding)
    assert_routed(model, inputs, ["c", "a", "b"], *rounding)


def test_swin_repeats_a_task_for_each_window():
    model, inputs = tiny("swin").double().eval(), inputs_of("swin")
    moved(model, get("lora")(rank=2), "a", 1)
    moved(model, get("houlsby")(bottleneck=3), "b", 2)
    assert_routed(model, inputs, ["b", "a", None])


@pytest.mark.parametrize("family", ["bert", "swin"])
def test_other_supports_of_dsee_in_one_batch(family: str):
    """Constants of each delta, beside those that all share; swin repeats them for each window."""
    model, inputs = tiny(family).double().eval(), inputs_of(family)
    for seed, name in enumerate("ab"):
        delta = attach(model, get("dsee")(rank=2, nonzero=5, support="random"), name=name, seed=seed)
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    supports = [d.slots[0][1]._parameters["indices"] for d in st.deltas(model).values()]
    assert not torch.equal(*supports)
    assert_routed(model, inputs, MIXED)
    assert_routed(model, inputs, ["b", None, "a"])


def test_training_reaches_each_deltas_own_parameters():
    model, inputs = tiny("bert").double().eval(), inputs_of("bert")
    tasks = {t: moved(model, [get("lora")(rank=2), get("bitfit")()], t, s) for s, t in enumerate("ab")}
    wanted = {}
    for task, delta in tasks.items():
        rows = [i for i, t in enumerate(MIXED) if t == task]
        delta.activate()
        part = {k: v[rows] for k, v in inputs.items()}
        F.cross_entropy(model(**part).logits, part["labels"], reduction="sum").backward()
        wanted |= {(task, n): p.grad for n, p in delta.named_parameters()}
        for p in delta.parameters():
            p.grad = None
    with route(model, MIXED):
        F.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="sum").backward()
    for (task, name), grad in wanted.items():
        own = dict(tasks[task].named_parameters())[name].grad
        torch.testing.assert_close(own, grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool):
    model, inputs = tiny("gpt2").double(), inputs_of("gpt2")
    deltas = [moved(model, get("lora")(rank=2), t, s) for s, t in enumerate("ab")]

    def gradients():
        with route(model, MIXED):
            model(**inputs).logits.square().sum().backward()
        grads = [p.grad for d in deltas for p in d.parameters()]
        for d in deltas:
            for p in d.parameters():
                p.grad = None
        return grads

    plain = gradients()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_is_routed():
    """A graph holds for every thread, so the model runs as it is written; before and after, the graph runs."""
    model, inputs = tiny("bert").double().eval(), inputs_of("bert")
    for seed, task in enumerate("ab"):
        moved(model, get("lora")(rank=2), task, seed)
    alone = solo(model, inputs, ["a", "b", None])
    st.activate(model, "a")
    captured, number = [], 0

    def backend(graph, examples):
        captured.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for tasks in (["a", "b", None], ["b", "b", "a"]):   # before and after it was compiled
            with route(model, tasks):
                mixed = compiled(**inputs).logits
            for row, task in enumerate(tasks):
                torch.testing.assert_close(mixed[row], alone[task][row], rtol=1e-9, atol=1e-10)
            assert len(captured) == number
            torch.testing.assert_close(compiled(**inputs).logits, alone["a"], rtol=1e-9, atol=1e-10)
            number = len(captured)
            assert number
    inner = {k: v for k, v in inputs.items() if k != "labels"}
    with route(model, ["a", "b", "a"]), pytest.raises(Exception, match="a route is open"):
        torch.export.export(model, (), inner)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(method: str, beams: int):
    """Prefill, decode and beams: each row as its delta generates it alone."""
    model, ids = tiny("gpt2").eval(), batch("gpt2")["input_ids"]
    for seed, task in enumerate("ab"):
        moved(model, small(get(method)), task, seed)
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    alone, tasks = {}, MIXED if method == "prompt_tuning" else ["b", None, "a"]
    for task in dict.fromkeys(tasks):
        st.activate(model, *([task] if task else []))
        alone[task] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    with route(model, tasks):
        mixed = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for row, task in enumerate(tasks):
        width = min(mixed.shape[1], alone[task].shape[1])
        assert torch.equal(mixed[row, :width], alone[task][row, :width])


def traffic(requests: int, threads: int) -> None:
    """Random mixed requests while other deltas come and go; every answer must be the one it is alone."""
    model = tiny("bert").eval()
    kinds = [get("lora")(rank=2), get("houlsby")(bottleneck=3, norms="none"), get("lora")(rank=2), get("ia3")(),
             get("bitfit")()]
    for seed, kind in enumerate(kinds):
        moved(model, kind, f"t{seed}", seed)
    tasks = [None, *(f"t{i}" for i in range(len(kinds)))]
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    alone = solo(model, inputs, tasks)
    st.activate(model)
    stop = []

    def churn() -> None:
        number = 0
        while not stop:
            number += 1
            extra = moved(model, get("bitfit")() if number % 2 else get("lora")(rank=2), f"x{number}", number)
            st.activate(model)
            extra.detach()

    def request(seed: int) -> bool:
        chosen = random.Random(seed).choices(tasks, k=3)
        with torch.no_grad(), route(model, chosen):
            mixed = model(**inputs).logits
        return all(torch.allclose(mixed[i], alone[t][i], atol=1e-6) for i, t in enumerate(chosen))

    worker = Thread(target=churn)
    worker.start()
    try:
        with ThreadPoolExecutor(threads) as pool:
            wrong = [i for i, right in enumerate(pool.map(request, range(requests))) if not right]
    finally:
        stop.append(True)
        worker.join()
    assert not wrong, f"{len(wrong)} of {requests} answers differ, the first of seed {wrong[0]}"
    assert not model._modules[CHILD].plan.routes
    assert not model._modules[CHILD].leaving


def test_traffic():
    traffic(200, 4)


@pytest.mark.slow
def test_ten_thousand_requests():
    traffic(10_000, 8)


def test_a_detached_delta_answers_to_its_end():
    model, inputs = tiny("bert").double().eval(), inputs_of("bert")
    first = moved(model, get("lora")(rank=2), "a", 1)
    alone = solo(model, inputs, ["a"])["a"]
    st.activate(model)
    with torch.no_grad(), route(model, ["a"] * 3):
        first.detach()
        moved(model, get("lora")(rank=2), "a", 2)          # another one of that name
        assert torch.equal(output(model, inputs), alone) or torch.allclose(output(model, inputs), alone, atol=1e-12)
    assert not torch.allclose(output(model, inputs), alone)
    st.deltas(model)["a"].detach()
    assert CHILD not in model._modules
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_a_batch_of_the_plain_backbone_keeps_nothing():
    """What a route's examples do not read is not kept for anybody."""
    model = tiny("bert").eval()
    moved(model, get("parallel_adapter")(bottleneck=3), "a")
    with torch.no_grad(), route(model, [None] * 3):
        output(model, batch("bert"))
    assert not any(getattr(m, "stash", None) for m in model.modules())


def test_refusals():
    model, inputs = tiny("bert"), batch("bert")
    with pytest.raises(DeltaError, match="no delta is attached"), route(model, ["a"]):
        pass
    moved(model, get("lora")(rank=2), "sst2")
    moved(model, get("prompt_tuning")(length=2), "cola")
    with pytest.raises(DeltaError, match="sst2"), route(model, ["sst", "sst2", "sst2"]):
        pass
    with pytest.raises(MethodError, match="PromptTuning"), route(model, ["sst2", "cola", "sst2"]):
        pass
    st.activate(model, "sst2")
    st.deltas(model)["sst2"].merge()
    with pytest.raises(DeltaError, match="is merged into the backbone"), route(model, ["cola"] * 3):
        pass
    st.deltas(model)["sst2"].unmerge()
    with pytest.raises(DeltaError, match="2 tasks, and the batch 3"), route(model, ["sst2", "sst2"]):
        model(**inputs)
    with route(model, ["sst2"] * 3), pytest.raises(DeltaError, match="open on this model already"), \
            route(model, ["sst2"] * 3):
        pass
    assert not model._modules[CHILD].plan.routes
