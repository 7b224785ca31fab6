"""VPT as keys and values is VPT as tokens, beside other methods and under masks; the backbone is in eval mode."""
import pytest
import torch
from vpt_cases import images, run

import slimtune as st
from slimtune.methods.vpt import VPT
from slimtune.testing import batch, output, randomize, tiny


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "dinov2", "dinov2_with_registers", "clip", "swin"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_are_tokens(family: str, implementation: str):
    """Outputs and gradients, in float64 and float32; in training, with the same masks of dropout."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = []
        for path in ("keys", "tokens"):
            model = tiny(family).to(dtype).train()
            model.set_attn_implementation(implementation)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in images(family).items()}
            torch.manual_seed(0)
            found.append(run(model, VPT(length=3, path=path), inputs))
        # eager attention has its softmax in float32, whatever the model's dtype
        exact = bound if implementation == "sdpa" or dtype == torch.float32 else 1e-5
        torch.testing.assert_close(found[0], found[1], atol=exact * 10, rtol=exact * 10)


@pytest.mark.parametrize("other", [
    st.methods.LoRA(rank=2, sites=("attn.k", "attn.v")), st.methods.SSF(), st.methods.ParallelAdapter(bottleneck=3),
    st.methods.PrefixTuning(length=2), st.methods.PromptTuning(length=2), VPT(length=2, deep=False),
    VPT(length=2, location="add-1")], ids=repr)
def test_keys_are_tokens_beside_other_methods(other):
    """The block's own norm and projections run on the prompt; what others read of the model's own tokens stays."""
    outs = []
    for path in ("keys", "tokens"):
        model = tiny("vit").double()
        if isinstance(other, VPT | st.methods.PromptTuning):  # as another delta that is active with it
            randomize(st.attach(model, other.model_copy(update={"head": "none"}), name="other"))
            delta = randomize(st.attach(model, VPT(length=3, path=path, head="none")))
            st.activate(model, "other", "default")
        else:
            delta = randomize(st.attach(model, [VPT(length=3, path=path, head="none"), other]), std=0.5)
        out = output(model, images("vit"))
        outs.append((out, torch.autograd.grad(out.square().sum(), list(delta.parameters()))))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_patches(implementation: str):
    """Masked patches may hold anything: neither the model's own tokens nor the prompts see them."""
    outs = {}
    for path, deep in (("keys", True), ("tokens", True), ("tokens", False)):
        model, inputs = tiny("vit").double(), images("vit")
        model.set_attn_implementation(implementation)
        inputs["attention_mask"] = torch.ones(3, 17, dtype=torch.long)
        inputs["attention_mask"][1, [3, 16]] = 0  # patches 2 and 15
        randomize(st.attach(model, VPT(length=3, path=path, deep=deep, head="none")), std=0.5)
        outs[path, deep] = out = output(model, inputs)
        for row, column in ((0, 8), (12, 12)):
            inputs["pixel_values"][1, :, row:row + 4, column:column + 4] += 5.0
        torch.testing.assert_close(output(model, inputs), out)
        del inputs["attention_mask"]
        assert not torch.allclose(output(model, inputs)[1], out[1])
    torch.testing.assert_close(outs["keys", True], outs["tokens", True], atol=1e-6, rtol=0)


def test_each_block_sees_the_tokens():
    """m + l of them as tokens and m by keys and values; none behind the last block unless they are to stay."""
    for settings, seen in (({"path": "tokens"}, [20] * 3), ({"deep": False}, [20] * 3), ({}, [17] * 3),
                           ({"blocks": (1,)}, [17, 20, 20]), ({"strip": False}, [17, 17, 20])):
        model, lengths = tiny("vit", num_hidden_layers=3), []
        st.attach(model, VPT(length=3, **settings))
        for layer in model.vit.layers:
            layer.mlp.register_forward_hook(lambda m, a, y, s=lengths: s.append(a[0].shape[1]))
        last = model.vit(**images("vit") | {"pixel_values": batch("vit")["pixel_values"]}).last_hidden_state
        assert (lengths, last.shape[1]) == (seen, 20 if "strip" in settings else 17)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_backbone_is_in_eval_mode(family: str):
    """Its dropout and stochastic depth are off while the prompt trains; `backbone_eval=False` leaves them on."""
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3} | (
        {"drop_path_rate": 0.5} if family == "swin" else {})
    inputs = {"pixel_values": batch(family)["pixel_values"]}
    for quiet in (True, False):
        model = tiny(family, dropout=True, **changes)
        delta = st.attach(model, VPT(length=3, dropout=0.0, backbone_eval=quiet))
        wanted, own = output(model, inputs), output(model.train(), inputs)
        assert torch.allclose(own, wanted, atol=1e-6) == quiet
        assert all(m.training for m in model.modules())
        if quiet:  # a recomputation is as quiet as what it repeats
            right = torch.autograd.grad(wanted.square().sum(), list(delta.parameters()))
            model.gradient_checkpointing_enable({"use_reentrant": False})
            found = torch.autograd.grad(output(model, inputs).square().sum(), list(delta.parameters()))
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
        delta.detach()
        assert not torch.allclose(output(model, inputs), output(model, inputs))


@pytest.mark.parametrize("path", ["keys", "tokens"])
def test_projections_of_each_examples_own(path: str):
    """A prompt that all share, and LoRA on the projections with an example axis, against each example alone."""
    model, x = tiny("vit").double(), images("vit")["pixel_values"]
    union = [VPT(length=3, path=path, head="none"), st.methods.LoRA(rank=2, sites=("attn.k", "attn.v"))]
    delta, generator = randomize(st.attach(model, union)), torch.Generator().manual_seed(1)
    wide = [(slot, {n: torch.randn(3, *p.shape, generator=generator).double() for n, p in slot._parameters.items()})
            for slot in delta.by_method()[1][1]]

    def give(pick):
        for slot, values in wide:
            slot._parameters.update({n: torch.nn.Parameter(pick(v)) for n, v in values.items()})
    give(lambda v: v)
    together = output(model, {"pixel_values": x})
    for i in range(3):
        give(lambda v, i=i: v[i])
        torch.testing.assert_close(output(model, {"pixel_values": x[i:i + 1]}), together[i:i + 1])
