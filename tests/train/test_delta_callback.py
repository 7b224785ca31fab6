"""DeltaCallback in a user's own transformers.Trainer."""
import pytest
import torch
from test_delta_trainer import arguments
from test_guard import Unused
from train_toys import attached, collate, rows, sha

import slimtune as st
from slimtune.errors import TrainError
from slimtune.testing import tiny
from slimtune.train import DeltaCallback


def own(folder, delta, **changes):
    from transformers import Trainer

    return Trainer(model=delta.model, args=arguments(folder, **changes), train_dataset=rows(), data_collator=collate,
                   callbacks=[DeltaCallback(delta)])


def test_each_checkpoint_gets_the_delta(tmp_path):
    delta = attached()
    made = own(tmp_path, delta)
    made.train()
    for step in (2, 4):
        assert {path.name for path in (tmp_path / f"checkpoint-{step}" / "delta").iterdir()} == {
            "delta.json", "delta.safetensors"}
    loaded = st.load(tiny("bert", dropout=True), tmp_path / "checkpoint-4" / "delta")
    assert sha(loaded) == sha(delta)
    older = st.load(tiny("bert", dropout=True), tmp_path / "checkpoint-2" / "delta")
    assert sha(older) != sha(delta)


@pytest.mark.parametrize("method", [st.methods.LoRA(rank=2, dropout=0.1), st.methods.Full()])
def test_the_users_trainer_resumes(tmp_path, method):
    """What of checkpoint-N is transformers' own still works with a delta on the model."""
    whole = attached(method)
    own(tmp_path / "whole", whole).train()
    own(tmp_path / "half", attached(method), max_steps=2, lr_scheduler_type="constant").train()
    again = attached(method)
    made = own(tmp_path / "half", again, lr_scheduler_type="constant")
    made.train(resume_from_checkpoint=True)
    constant = attached(method)
    own(tmp_path / "constant", constant, lr_scheduler_type="constant").train()
    assert sha(again) == sha(constant)
    assert sha(again) != sha(whole)


def test_it_trains_what_delta_trainer_trains(tmp_path):
    delta = attached()
    before = sha(delta)
    base = {name: p.clone() for name, p in st.core.base_parameters(delta.model).items() if "classifier" not in name}
    own(tmp_path, delta).train()
    assert sha(delta) != before
    now = st.core.base_parameters(delta.model)
    assert all(torch.equal(now[name], value) for name, value in base.items())


def test_a_run_that_trains_nothing_fails(tmp_path):
    with pytest.raises(TrainError, match=r"step 1: no gradient reaches encoder.0.mlp.down.unused.b"):
        own(tmp_path, attached(Unused())).train()


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    delta = attached()
    dict(delta.named_parameters())["head.classifier.bias"].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainError, match=r"step 1: the gradient of \S+ is nan"):
        own(tmp_path, delta).train()
