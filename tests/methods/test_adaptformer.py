"""AdaptFormer against its paper: MLP(LN(x')) + s up(ReLU(down(x'))), x' the residual stream."""
import pytest
import torch
import torch.nn.functional as F

import slimtune as st
from slimtune.testing import assert_equation, batch, doubled, meta, output, randomize, site_io, tiny

M = st.methods


@pytest.mark.parametrize(("family", "site"), [
    ("vit", "vision.1.mlp"), ("gpt2", "decoder.0.mlp"), ("bert", "encoder.0.mlp")])
def test_equation(family: str, site: str):
    p, x, y, out = site_io(st.attach(tiny(family).double().eval(), M.AdaptFormer(bottleneck=4)), site)
    assert_equation(out, y + 0.1 * (F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]), p)


def test_reads_the_residual_stream():
    """On ViT, plain hooks around each block's second norm and feed-forward network give the same output."""
    model, inputs = tiny("vit").double().eval(), batch("vit")
    inputs = doubled(inputs)
    delta = randomize(st.attach(model, M.AdaptFormer(bottleneck=4, head="none")))
    own, state = output(model, inputs), delta.state()
    delta.detach()
    for i, layer in enumerate(model.vit.layers):
        p = {n: state[f"vision.{i}.mlp.adaptformer.{n}"] for n in ("down", "down_bias", "up", "up_bias")}
        seen: list[torch.Tensor] = []
        layer.layernorm_after.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        layer.mlp.register_forward_hook(lambda m, a, y, p=p, seen=seen: y + 0.1 * (
            F.relu(seen[-1] @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))
    torch.testing.assert_close(output(model, inputs), own)


@pytest.mark.parametrize(("width", "numbers"), [(64, 1_189_632), (8, 156_768)])
def test_count(width: int, numbers: int):
    assert st.attach(meta.vit_b16_meta(), M.AdaptFormer(bottleneck=width)).count().adapter == numbers
