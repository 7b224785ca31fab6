"""DeltaTrainer with transformers' own arguments: what it optimises, saves and loads; accumulation against an oracle."""
import json
from pathlib import Path

import pytest
import torch
from train_toys import attached, collate, rows, sha

import slimtune as st
from slimtune.errors import DeltaError, TrainError
from slimtune.testing import tiny
from slimtune.train import DeltaTrainer, last_checkpoint
from slimtune.train.state import adamw


def arguments(folder, **changes):
    from transformers import TrainingArguments

    values = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
              "save_steps": 2, "logging_steps": 2, "report_to": "none", "disable_tqdm": True, "seed": 0,
              "remove_unused_columns": False, "dataloader_pin_memory": False}
    return TrainingArguments(**{**values, **changes})


def trainer(folder, delta=None, **changes):
    return DeltaTrainer(delta or attached(), arguments(folder, **changes), train_dataset=rows(), data_collator=collate,
                        eval_dataset=rows(9, seed=1), compute_metrics=scores)


def scores(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def test_only_the_delta_is_optimised(tmp_path):
    delta = attached()
    other = st.attach(delta.model, st.methods.LoRA(rank=2), name="other")
    delta.activate()
    still = sha(other)
    made = trainer(tmp_path, delta)
    made.train()
    held = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in delta.parameters()}
    assert sha(other) == still


def test_resume_true_is_bitwise(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    half = trainer(tmp_path / "half")
    half.add_callback(stopping_at(2))
    half.train()
    assert half.state.global_step == 2
    again = trainer(tmp_path / "half")
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=True)
    assert sha(again.delta) == sha(whole.delta)
    with pytest.raises(TrainError, match="no checkpoint to resume from"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [
    lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9), lambda params: torch.optim.Adagrad(params, lr=1e-2),
    lambda params: torch.optim.NAdam(params, lr=1e-3), lambda params: torch.optim.RAdam(params, lr=1e-2)])
def test_resume_with_the_users_optimizer(tmp_path, make):
    def made(folder):
        delta = attached()
        return DeltaTrainer(delta, arguments(folder), train_dataset=rows(), data_collator=collate,
                            optimizers=(make(list(delta.parameters())), None))

    whole = made(tmp_path)
    whole.train()
    again = made(tmp_path)
    again.train(str(tmp_path / "checkpoint-2"))
    assert sha(again.delta) == sha(whole.delta)


def test_an_optimizer_of_other_tensors_is_refused(tmp_path):
    delta, other = attached(), attached()
    made = DeltaTrainer(delta, arguments(tmp_path), train_dataset=rows(), data_collator=collate,
                        optimizers=(torch.optim.SGD([*delta.parameters(), *other.parameters()], lr=1e-2), None))
    with pytest.raises(TrainError, match="the optimizer holds tensors that are not the delta's"):
        made.train()


def test_a_model_without_a_loss_is_said(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    made = DeltaTrainer(attached(), arguments(tmp_path), train_dataset=data, data_collator=collate)
    with pytest.raises(TrainError, match=r"returned no loss.\n.*The collator gives: input_ids attention_mask"):
        made.train()


def stopping_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                control.should_training_stop = True

    return Stop()


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluating_changes_no_run(tmp_path, strategy):
    """transformers' own evaluation draws a random number for its loader."""
    plain = trainer(tmp_path / "a", max_steps=12)
    plain.train()
    judged = trainer(tmp_path / "b", max_steps=12, eval_strategy=strategy, eval_steps=1)
    judged.train()
    assert sha(plain.delta) == sha(judged.delta)


def test_load_best_model_at_end(tmp_path):
    made = trainer(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=2, learning_rate=0.3,
                   lr_scheduler_type="constant", load_best_model_at_end=True, metric_for_best_model="loss",
                   save_total_limit=1)
    made.train()
    losses = {line["step"]: line["eval_loss"] for line in made.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == losses[best]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{best}", "checkpoint-12"}


def test_the_users_arguments_are_not_changed(tmp_path):
    args = arguments(tmp_path, save_total_limit=2)
    DeltaTrainer(attached(), args, train_dataset=rows(), data_collator=collate)
    assert args.save_total_limit == 2
    assert args.logging_nan_inf_filter


def test_save_model_writes_a_delta(tmp_path):
    made = trainer(tmp_path)
    made.train()
    made.save_model()
    made.save_model(str(tmp_path / "here"))
    for folder in (tmp_path / "delta", tmp_path / "here"):
        assert sha(st.load(tiny("bert", dropout=True), folder)) == sha(made.delta)


def test_what_it_does_not_support_is_said(tmp_path):
    args = arguments(tmp_path)
    args.push_to_hub = True
    with pytest.raises(TrainError, match="does not support push_to_hub"):
        DeltaTrainer(attached(), args, train_dataset=rows())


def test_a_checkpoint_of_another_delta_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(DeltaError, match="another method"):
        trainer(tmp_path, attached(st.methods.IA3())).train(resume_from_checkpoint=True)


def test_facts_are_kept(tmp_path):
    made = DeltaTrainer(attached(), arguments(tmp_path), train_dataset=rows(), data_collator=collate,
                        facts={"recipe": "abc"})
    made.train()
    manifest = json.loads((last_checkpoint(tmp_path) / "checkpoint.json").read_text())
    assert manifest["run"] == {"recipe": "abc"}
    assert manifest["step"] == 4
    assert manifest["delta"]["methods"][0]["name"] == "lora"


def long_pairs(batch):
    made = collate([{"input_ids": row["input_ids"]} for row in batch])
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


def tags(batch):
    made = collate([{"input_ids": row["input_ids"]} for row in batch])
    ids = made["input_ids"]
    return {**made, "labels": torch.where((ids % 2 == 1) & (made["attention_mask"] == 1), ids % 3, -100)}


def tagger():
    from transformers import BertForTokenClassification

    torch.manual_seed(0)
    return BertForTokenClassification(tiny("bert").config)


@pytest.mark.parametrize(("make", "join"), [
    (lambda: tiny("bert"), collate), (lambda: tiny("roberta"), collate), (tagger, tags),
    (lambda: tiny("gpt2"), long_pairs), (lambda: tiny("llama"), long_pairs), (lambda: tiny("t5"), long_pairs),
    (lambda: tiny("bert", num_labels=1, problem_type="regression"),
     lambda batch: collate([{**row, "labels": float(row["labels"])} for row in batch]))])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_is_one_big_batch(tmp_path, monkeypatch, make, join, accumulate):
    """Oracle: the gradient of the mean over all examples (or scored tokens) of the step, in one forward pass.

    transformers' own Trainer gives twice that for BERT's classifier at an accumulation of 2.
    """
    data, size = rows(10), -(-10 // accumulate)
    oracle = st.attach(make(), st.methods.LoRA(rank=2))
    oracle.model(**join(data)).loss.backward()
    wanted = {name: p.grad.clone() for name, p in oracle.named_parameters()}
    delta = st.attach(make(), st.methods.LoRA(rank=2))
    seen = {}

    def look(self, model, grad_norm=None):
        seen.update({name: p.grad.clone() for name, p in delta.named_parameters()})
        return torch.tensor(0.0)

    monkeypatch.setattr(DeltaTrainer, "_get_grad_norm", look)
    made = DeltaTrainer(delta, arguments(tmp_path, max_steps=1, per_device_train_batch_size=size, save_strategy="no",
                                         gradient_accumulation_steps=accumulate, max_grad_norm=0.0,
                                         logging_steps=1, train_sampling_strategy="sequential"),
                        train_dataset=data, data_collator=join)
    made.train()
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert made.state.log_history[0]["loss"] == pytest.approx(oracle.model(**join(data)).loss.item(), rel=1e-4)


def test_a_batch_without_a_scored_token_is_no_nan(tmp_path):
    delta = st.attach(tagger(), st.methods.LoRA(rank=2))
    data = [{"input_ids": [4, 6, 8, 10]}] * 2 + rows(2)
    made = DeltaTrainer(delta, arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no",
                                         gradient_accumulation_steps=2, train_sampling_strategy="sequential"),
                        train_dataset=data, data_collator=tags)
    made.train()
    assert all(bool(p.isfinite().all()) for p in delta.parameters())


def test_fused_and_plain_adamw_agree():
    """The fused kernel is the same update."""
    fused, plain = attached(), attached()
    ours = adamw(fused, lr=1e-2, weight_decay=0.1)
    assert all(group["fused"] for group in ours.param_groups)
    theirs = torch.optim.AdamW([{"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
                                {"params": [p for p in plain.parameters() if p.dim() <= 1], "weight_decay": 0.0}],
                               lr=1e-2, fused=False)
    for step in range(3):
        for delta, optimizer in ((fused, ours), (plain, theirs)):
            delta.model.eval()
            delta.model(**collate(rows(4, seed=step))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in fused.state().items():
        torch.testing.assert_close(value, plain.state()[name], rtol=1e-4, atol=1e-5)


def test_no_file_of_transformers_is_written(tmp_path):
    trainer(tmp_path).train()
    assert not [path for path in Path(tmp_path).rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
