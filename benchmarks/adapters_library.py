"""Step time of adapters and Compacter, beside the `adapters` library in an environment of its own.

    python benchmarks/adapters_library.py --peer V/bin/python [--out benchmarks/results/adapters_library.json]

`adapters` pins transformers 4, so it cannot share a process with ours. The peer's environment is made by
`python3 -m venv V && V/bin/pip install torch==2.13.0 adapters==1.3.0`. BERT-base, the same weights in both, batch 4,
128 tokens, no dropout, one thread; the two processes run one after the other, several times. A step is forward,
backward and AdamW. Every figure is a ratio, ours over theirs, of a pair's median steps, with its spread.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("houlsby", "pfeiffer", "compacter")
BATCH, TOKENS = 4, 128


def model(weights: Path) -> Any:
    import torch
    import transformers
    from safetensors.torch import load_file, save_model

    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    torch.manual_seed(0)
    made = transformers.BertForSequenceClassification(config)
    if weights.exists():
        left = made.load_state_dict(load_file(weights), strict=False)
        assert not left.unexpected_keys, left
    else:
        save_model(made, str(weights))
    return made


def ours(name: str, made: Any) -> list[Any]:
    import slimtune as st

    M = st.methods
    method = {"houlsby": M.Houlsby(bottleneck=48, norms="none", activation="silu"),
              "pfeiffer": M.Pfeiffer(bottleneck=48), "compacter": M.Compacter(norms="none", activation="gelu")}[name]
    return list(st.attach(made, method).parameters())


def theirs(name: str, made: Any) -> list[Any]:
    import adapters

    adapters.init(made)
    config = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn", "compacter": "compacter"}[name]
    made.add_adapter("a", config=config)
    made.train_adapter("a")
    return [p for p in made.parameters() if p.requires_grad]


def work(side: str, name: str, weights: Path, steps: int) -> None:
    """Print the CPU seconds of each step, and how many numbers are trained."""
    import torch

    torch.set_num_threads(1)
    made = model(weights).train()
    parameters = (ours if side == "ours" else theirs)(name, made)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(5, 30_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    taken = []
    for _ in range(steps + 2):
        start = time.process_time()
        optimizer.zero_grad()
        made(input_ids=ids, labels=torch.arange(BATCH) % 2).loss.backward()
        optimizer.step()
        taken.append(time.process_time() - start)
    import transformers
    print(json.dumps({"steps": taken[2:], "trainable": sum(p.numel() for p in parameters), "torch": torch.__version__,
                      "transformers": transformers.__version__}))


def run(python: str, side: str, name: str, weights: Path, steps: int) -> dict[str, Any]:
    command = [python, __file__, "--worker", side, name, str(weights), str(steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of the environment with `adapters`")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, name, weights, steps = options.worker
        return work(side, name, Path(weights), int(steps))
    if not options.peer:
        parser.error("--peer: the python of an environment with `adapters` is needed")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        weights = Path(home) / "bert.safetensors"
        for name in METHODS:
            ratios, last = [], {}
            for _ in range(options.pairs):
                a = run(sys.executable, "ours", name, weights, options.steps)
                b = run(options.peer, "theirs", name, weights, options.steps)
                ratios.append(statistics.median(a["steps"]) / statistics.median(b["steps"]))
                last = {"ours": a, "theirs": b}
            rows[name] = {"ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3),
                          "highest": round(max(ratios), 3), "pairs": len(ratios),
                          **{side: {k: v for k, v in values.items() if k != "steps"} for side, values in last.items()}}
            print(name, json.dumps(rows[name]), flush=True)
    machine = {"processor": platform.machine(), "python": platform.python_version(), "threads": 1}
    if options.out:
        found = {"machine": machine, "batch": BATCH, "tokens": TOKENS, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
