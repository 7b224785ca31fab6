"""Models, methods and starts whose gradients are of no example alone."""
import pytest
import torch
from privacy_toys import delta_of, texts
from torch import nn

import slimtune as st
from slimtune.errors import MethodError, TrainError
from slimtune.privacy.guards import check_delta, probe
from slimtune.testing import small, tiny


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "bitfit", "full"])
def test_sound_models_pass_with_dropout_on(name):
    delta = st.attach(tiny("bert", dropout=True), small(st.methods.get(name)))
    delta.model.train()
    check_delta(delta)
    probe(delta, texts(3))


def test_a_module_that_mixes_examples_is_found_by_its_gradients():
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    delta = delta_of("bert", st.methods.LoRA(rank=2))
    delta.model.dropout = Centre()
    with pytest.raises(MethodError, match="when another is replaced"):
        probe(delta, texts(3))


def test_batch_norm_is_refused_by_name():
    delta = delta_of("bert", st.methods.LoRA(rank=2))
    delta.model.dropout = nn.BatchNorm1d(32)
    with pytest.raises(MethodError, match="dropout: batch norm mixes"):
        check_delta(delta)


def test_a_loss_that_is_not_ours_is_refused():
    delta = delta_of("bert", st.methods.LoRA(rank=2))
    forward = delta.model.forward

    def more(*args, **kwargs):
        out = forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + 1
        return out

    delta.model.forward = more
    with pytest.raises(MethodError, match="has loss"):
        probe(delta, texts(3))


def test_half_precision_and_starts_that_read_the_data_are_refused():
    with pytest.raises(MethodError, match="half precision"):
        check_delta(st.attach(tiny("bert").bfloat16(), st.methods.Full()))
    with pytest.raises(MethodError, match="VPT starts from the training data"):
        check_delta(st.attach(tiny("vit"), st.methods.VPT(length=3, deep=True, init="class_inputs")))


def test_damaged_labels_are_told_before_training():
    delta = delta_of("bert", st.methods.LoRA(rank=2))
    with torch.no_grad():
        delta.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match="before any training"):
        probe(delta, texts(3))
