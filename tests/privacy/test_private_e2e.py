"""GPT-2 writes restaurant descriptions from their data, privately, end to end: E2E NLG's own file, byte by byte."""
import csv
import json
import os
from pathlib import Path

import pytest
import torch

import slimtune as st
from slimtune.privacy import PrivacySpec, example_losses
from slimtune.testing import tiny
from slimtune.train import TrainSpec, fit

FILE = Path(os.environ.get("SLIMTUNE_E2E", Path(__file__).parents[3] / "shared/data/text/e2e_nlg")) / "devset.csv"
END, PAD, EXAMPLES = 256, 257, 60
PRIVACY = PrivacySpec(epsilon=8, delta=1e-3, accountant="rdp", batch_size=20, clip=1.0, clipping="per_layer", seed=0)


def rows() -> list[dict[str, list[int]]]:
    """Bytes of the data and of one text about it; only the text is scored."""
    with FILE.open(encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file))[:EXAMPLES]
    made = []
    for pair in pairs:
        data, text = list(f"{pair['mr'][:40]}\n".encode()), [*pair["ref"][:40].encode(), END]
        made.append({"input_ids": data + text, "labels": [-100] * len(data) + text})
    return made


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": PAD, "labels": -100}
    made = {key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])
            for key, value in fill.items()}
    return made | {"attention_mask": (made["input_ids"] != PAD).long()}


def loss(model, data) -> float:
    model.eval()
    with torch.no_grad():
        return float(example_losses(model, collate(data)).mean())


@pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there")
@pytest.mark.parametrize(("method", "gain"), [(st.methods.Full(), 0.5), (st.methods.LoRA(rank=4), 0.01)],
                         ids=["full", "lora"])
def test_it_trains_saves_and_writes(tmp_path, method, gain):
    """gain: of the loss; LoRA moves little in a model whose every weight is random and whose output map is frozen."""
    def backbone():
        return tiny("gpt2", vocab_size=258, n_positions=96, eos_token_id=END, pad_token_id=PAD)

    data, model = rows(), backbone()
    delta = st.attach(model, method)
    before = loss(model, data)
    spec = TrainSpec(steps=12, batch_size=8, learning_rate=2e-2, threads=1, save_every=100)
    result = fit(delta, data, None, collate, None, spec, tmp_path / "run", privacy=PRIVACY)
    assert result.privacy is not None
    assert 7.9 < result.privacy["epsilon"] <= 8
    assert (result.privacy["clipping"], result.privacy["steps"]) == ("per_layer", 12)
    after = loss(model, data)
    assert after < before - gain, "it learnt something through the noise"
    delta.save(tmp_path / "delta")
    fresh = backbone()
    again = st.load(fresh, tmp_path / "delta")
    assert again.info["privacy"] == result.privacy
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["info"]["privacy"]["sampling"] == "poisson"
    assert loss(fresh, data) == after
    prompt = torch.tensor([data[0]["input_ids"][:20]])
    written = [m.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
               for m in (model, fresh)]
    assert torch.equal(*written)
