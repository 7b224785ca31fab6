"""Life cycle, saved bytes and step time of a delta, beside PEFT in the same process.

    python benchmarks/attach.py [--quick] [--threads 2] [--out benchmarks/results/attach.json]

BERT-base at random values, batch 4, 128 tokens. Every figure is a ratio of pairs taken in turn,
ours over PEFT's, as median with the spread from the 10th to the 90th percentile. A saved byte is a
distinct storage that autograd keeps for backward, parameters apart.
"""
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import slimtune as st

BATCH, TOKENS = 4, 128
ALL_PEFT = ["query", "key", "value", "dense"]
ALL_OURS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def bert(dtype: torch.dtype = torch.float32, layers: int = 12, hidden: int = 768) -> nn.Module:
    """BERT-base without dropout of its own, so that what is measured is the delta's."""
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_attention_heads=max(1, hidden // 64))
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).to(dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 30_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.arange(BATCH) % 2}


def peft_config(everywhere: bool, dropout: float) -> peft.LoraConfig:
    targets = r".*encoder.*\.(query|key|value|dense)" if everywhere else ["query", "value"]
    return peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets)


def our_lora(everywhere: bool, dropout: float) -> st.Method:
    sites = ALL_OURS if everywhere else ("attn.q", "attn.v")
    return st.methods.LoRA(rank=8, alpha=16, dropout=dropout, sites=sites, head="none")


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    pick = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return {"median": round(statistics.median(values), 4), "p10": round(pick(0.1), 4), "p90": round(pick(0.9), 4),
            "pairs": len(values)}


def paired(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of both in milliseconds and the spread of their ratio, taken in turn."""
    a, b = [], []
    for _ in range(pairs):
        a.append(ours())
        b.append(theirs())
    return {"ours_ms": round(1e3 * statistics.median(a), 3), "peft_ms": round(1e3 * statistics.median(b), 3),
            "ratio": spread([x / y for x, y in zip(a, b, strict=True)])}


# life cycle


def lifecycle(pairs: int, resident: int) -> dict[str, Any]:
    """attach, load, switch and detach with one delta, and with `resident` of them on the model."""
    ours, theirs = bert(), bert()
    wrapped = peft.get_peft_model(theirs, peft_config(False, 0.0))
    st.attach(ours, our_lora(False, 0.0), name="default")
    with tempfile.TemporaryDirectory() as home:
        st.deltas(ours)["default"].save(f"{home}/ours")
        wrapped.save_pretrained(f"{home}/peft")
        rows = {"1": _stage(ours, wrapped, home, pairs)}
        for i in range(resident - 1):
            st.attach(ours, our_lora(False, 0.0), name=f"r{i}")
            wrapped.add_adapter(f"r{i}", peft_config(False, 0.0))
        rows[str(resident)] = _stage(ours, wrapped, home, pairs)
    return rows


def _stage(ours: nn.Module, wrapped: peft.PeftModel, home: str, pairs: int) -> dict[str, Any]:
    steps = ("attach", "load", "switch", "detach")
    rows: dict[str, dict[str, list[float]]] = {step: {"ours": [], "peft": []} for step in steps}

    def note(row: str, who: str, run: Callable[[], object]) -> None:
        rows[row][who].append(clock(run))

    for _ in range(pairs):
        note("attach", "ours", lambda: st.attach(ours, our_lora(False, 0.0), name="x"))
        note("attach", "peft", lambda: wrapped.add_adapter("x", peft_config(False, 0.0)))
        note("switch", "ours", lambda: st.activate(ours, "default"))
        note("switch", "peft", lambda: wrapped.set_adapter("default"))
        note("detach", "ours", lambda: st.deltas(ours)["x"].detach())
        note("detach", "peft", lambda: wrapped.delete_adapter("x"))
        note("load", "ours", lambda: st.load(ours, f"{home}/ours", name="y"))
        note("load", "peft", lambda: wrapped.load_adapter(f"{home}/peft", "y"))
        st.deltas(ours)["y"].detach()
        wrapped.delete_adapter("y")
    return {k: {"ours_ms": round(1e3 * statistics.median(v["ours"]), 3),
                "peft_ms": round(1e3 * statistics.median(v["peft"]), 3),
                "ratio": spread([a / b for a, b in zip(v["ours"], v["peft"], strict=True)])} for k, v in rows.items()}


def switch_many() -> dict[str, Any]:
    """A switch at 560 sites: 80 blocks of width 64, seven linear maps each, as in an 80-block Llama."""
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=80, vocab_size=100,
                                      num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config)
    every = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
    for name in ("a", "b"):
        st.attach(model, st.methods.LoRA(rank=2, sites=every), name=name)
    sites = len(st.deltas(model)["a"].slots)
    times = [clock(lambda n=n: st.activate(model, n)) for n in ["a", "b"] * 100]
    return {"sites": sites, "switch_ms": spread([1e3 * t for t in times])}


# saved bytes


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    total = sum(kept.values())  # while the graph lives, so no storage is counted twice under one address
    del loss
    return total


def floor_model(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The floor: a frozen body whose input asks for a gradient, so backward runs through every block."""
    model = bert(dtype).requires_grad_(False)
    token = nn.Parameter(torch.zeros(768, dtype=dtype))
    model.bert.embeddings.register_forward_hook(lambda m, a, out: out + token)
    return model, nn.ParameterList([token])


# steps


def stepper(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], float]:
    """One training step, forward and backward; the optimizer is the same for both and left out."""
    model.train()

    def step() -> float:
        return clock(lambda: model(**inputs).loss.backward())

    step()
    return step


def pair(dtype: torch.dtype, everywhere: bool, dropout: float) -> tuple[nn.Module, nn.Module]:
    ours = bert(dtype)
    st.attach(ours, our_lora(everywhere, dropout))
    # autocast_adapter_dtype is PEFT's default: float32 adapters beside a half-precision base, as ours
    return ours, peft.get_peft_model(bert(dtype), peft_config(everywhere, dropout))


def training(pairs: int) -> list[dict[str, Any]]:
    rows = []
    inputs = batch()
    for dtype in (torch.float32, torch.bfloat16):
        for everywhere in (False, True):
            for dropout in (0.0, 0.1):
                ours, theirs = pair(dtype, everywhere, dropout)
                row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "dropout": dropout,
                                       "sites": "all linears" if everywhere else "q,v"}
                a, b = saved_bytes(ours, inputs), saved_bytes(theirs, inputs)
                row["saved_bytes"] = {"ours": a, "peft": b, "ratio": round(a / b, 3)}
                step = stepper(ours, inputs)
                row["step"] = paired(step, stepper(theirs, inputs), pairs)
                if not everywhere and dropout == 0.0:
                    floor, _token = floor_model(dtype)
                    base = stepper(floor, inputs)
                    versus = paired(step, base, pairs)
                    row["over_floor"] = versus["ratio"]
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return {"cpu": name, "threads": threads, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__, "slimtune": st.__version__,
            "load_average": [round(x, 2) for x in os.getloadavg()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("lifecycle", "training"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(options.threads)}
    if options.only != "training":
        result["lifecycle"] = lifecycle(3 if options.quick else 9, 8 if options.quick else 64)
        result["switch_at_560_sites"] = switch_many()
        print(json.dumps({k: result[k] for k in ("lifecycle", "switch_at_560_sites")}, indent=1), flush=True)
    if options.only != "lifecycle":
        result["training"] = training(2 if options.quick else 7)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

