"""A batch with a task for each example, beside one delta for all of it, and beside PEFT's `adapter_names`.

    python benchmarks/route.py [--quick] [--threads 2] [--rounds 3] [--out benchmarks/results/route.json]

BERT-base of 32 and 128 tokens and a decoding step of GPT-2 after 32 tokens, at random values, LoRA rank 8 on query and
value (PEFT on GPT-2: on its fused projection), 64 examples, inference; 1000 deltas are attached. A batch has 1, 8 or 64
tasks in turn, or 64 drawn anew from the 1000 each time; a route is opened for every call, and is in the time. A round
takes each once, in random order, in one process; figures are ratios within a round, routed over one unrouted delta and
PEFT's mixed batch over PEFT's one adapter, and ours over PEFT's for the same batch (`ours_over_peft`), as median with
the least and the most. PEFT has 64 adapters: adding one
takes what `peft_add_ms` says, and more with each.

`resident`, in a process of its own: what the process grows by, over the sum of the deltas' files, and what adding one
takes. Rounds are --rounds of 128 tokens, twice as many of 32, three times as many of decoding.
"""
import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from torch import Tensor, nn

import slimtune as st

Run = Callable[[], object]
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"


def bert(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers)).eval()


def gpt2(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()


def ids(size: int, tokens: int) -> Tensor:
    return torch.randint(5, 30_000, (size, tokens), generator=torch.Generator().manual_seed(0))


def encode(size: int, tokens: int) -> Callable[..., Any]:
    """A call of a model on a batch."""
    text = ids(size, tokens)
    return lambda model, **extra: model(input_ids=text, **extra)


def decode(model: nn.Module, size: int, tokens: int = 32) -> Callable[..., Any]:
    """A call for one more token behind a cache, which is then as before."""
    with torch.no_grad():
        out = model(input_ids=ids(size, tokens), use_cache=True)
    cache, token = getattr(out, CACHE), ids(size, 1)

    def step(model: nn.Module, **extra: Any) -> None:
        model(input_ids=token, use_cache=True, **{CACHE: cache}, **extra)
        cache.crop(-1)

    return step


def tasks_of(size: int, distinct: int) -> list[str]:
    return [f"t{i % distinct}" for i in range(size)] if distinct <= size else [
        f"t{i}" for i in random.sample(range(distinct), size)]


def runs(model: nn.Module, peer: nn.Module, call: Callable[..., Any], theirs: Callable[..., Any], size: int,
         counts: list[int]) -> dict[str, Run]:
    """What a round takes: each library's one delta and its mixed batches."""
    def routed(distinct: int) -> None:
        with st.route(model, tasks_of(size, distinct)):
            call(model)

    made: dict[str, Run] = {"ours alone": lambda: call(model), "peft alone": lambda: theirs(peer)}
    for count in counts:
        made[f"ours {count}"] = lambda count=count: routed(count)
        if count <= size:
            made[f"peft {count}"] = lambda count=count: theirs(peer, adapter_names=tasks_of(size, count))
    return made


def measure(made: dict[str, Run], rounds: int, repeats: int) -> dict[str, Any]:
    """The ratios within each round, by number of tasks and library."""
    ratios: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for name in ("ours alone", "peft alone", f"ours {max(int(n.split()[1]) for n in made if 'alone' not in n)}"):
            made[name]()
        for _ in range(rounds):
            taken = {}
            for name in random.sample(list(made), len(made)):
                start = time.perf_counter()
                for _ in range(repeats):
                    made[name]()
                taken[name] = time.perf_counter() - start
            for name in made:
                library, count = name.split()
                ratios[name].append(taken[name] / taken[f"{library} alone"])
                if library == "ours" and f"peft {count}" in taken:
                    ratios.setdefault(f"ours_over_peft {count}", []).append(taken[name] / taken[f"peft {count}"])
    found: dict[str, Any] = {}
    for name, values in ratios.items():
        library, count = name.split()
        if count != "alone" or library == "ours_over_peft":
            found.setdefault(count, {})[library] = {"median": round(statistics.median(values), 3), "rounds": rounds,
                                                    "least": round(min(values), 3), "most": round(max(values), 3)}
    return found


def many(model: nn.Module, number: int) -> nn.Module:
    for i in range(number):
        st.attach(model, st.methods.LoRA(rank=8), name=f"t{i}", seed=i)
    st.activate(model, "t0")
    return model


def peer_of(model: nn.Module, targets: list[str], number: int) -> tuple[nn.Module, dict[str, float]]:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=targets == ["c_attn"])
    made, taken = peft.get_peft_model(model, config, adapter_name="t0").eval(), []
    for i in range(1, number):
        start = time.perf_counter()
        made.add_adapter(f"t{i}", config)
        taken.append(1e3 * (time.perf_counter() - start))
    made.set_adapter("t0")
    return made.eval(), {"first_ten": round(statistics.median(taken[:10]), 1),
                         "last_ten": round(statistics.median(taken[-10:]), 1)}


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident(layers: int, number: int) -> dict[str, Any]:
    """Load many deltas: what the process grows by over their files, and what adding one takes."""
    model, taken = bert(layers), []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "t"
        st.attach(model, st.methods.LoRA(rank=8), name="t").save(folder)
        file = sum(p.stat().st_size for p in folder.iterdir())
        st.load(model, folder, name="warm")
        before = memory()
        for i in range(number):
            start = time.perf_counter()
            st.load(model, folder, name=f"t{i}")
            taken.append(1e3 * (time.perf_counter() - start))
        grown = memory() - before
    return {"deltas": number, "file_bytes": file, "grown_over_files": round(grown / (file * number), 3),
            "add_ms_first_hundred": round(statistics.median(taken[:100]), 2),
            "add_ms_last_hundred": round(statistics.median(taken[-100:]), 2)}


def apart(options: argparse.Namespace, layers: int, number: int) -> dict[str, Any]:
    """`resident` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(options.threads), "--resident", str(layers), str(number)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, 16 examples and 100 deltas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["32", "128", "decode"], help="one of the three")
    parser.add_argument("--resident", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    if options.resident:
        print(json.dumps(resident(*options.resident)))
        return
    layers, size, number = (2, 16, 100) if options.quick else (12, 64, 1000)
    rows: dict[str, Any] = {"resident": apart(options, layers, number)}
    print("resident", json.dumps(rows["resident"]), flush=True)
    for kind, make, targets in (("bert", bert, ["query", "value"]), ("gpt2", gpt2, ["c_attn"])):
        wanted = [k for k in (["32", "128"] if kind == "bert" else ["decode"]) if options.only in (None, k)]
        if not wanted:
            continue
        model = many(make(layers), number)
        peer, rows[f"peft_add_ms {kind}"] = peer_of(make(layers), targets, size)
        for name in wanted:
            call = decode(model, size) if name == "decode" else encode(size, int(name))
            theirs = decode(peer, size) if name == "decode" else call
            made = runs(model, peer, call, theirs, size, [1, 8, size, number])
            times = {"128": 1, "32": 2, "decode": 3}[name]
            found = measure(made, times * options.rounds, 4 if name == "decode" else 1)
            for count, row in found.items():
                rows[f"{kind} {name}, {count} tasks"] = row
                print(f"{kind} {name}, {count} tasks", json.dumps(row), flush=True)
        del model, peer, call, theirs, made
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__,
                   "transformers": transformers.__version__, "peft": peft.__version__, "load": os.getloadavg()[0]}
        options.out.write_text(json.dumps({"machine": machine, "batch": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
