"""VPT against its paper on a ViT: tokens and vectors, what the head reads, counts, starts."""
import pytest
import torch
from vpt_cases import EXACT, assert_same, by_block, images, run, stream

import slimtune as st
from slimtune.core.promptsite import PromptSite
from slimtune.core.prototypes import class_means
from slimtune.errors import DataError, MethodError
from slimtune.methods.vpt import VPT
from slimtune.testing import batch, check_method, meta, output, randomize, tiny

DEEP = [10, 10, 10, 1, 1, 50, 5, 100, 100, 10, 1, 50, 200, 100, 50, 10, 50, 200, 200, *[10, 50, 5, 100, 200]]
SHALLOW = [100, 5, 1, 200, 50, 200, 1, 5, 50, 50, 10, 100, 200, 100, 100, 100, 100, 200, 200, *[100, 50, 100, 100, 100]]
"""The paper's chosen lengths: 19 tasks of VTAB-1k, five of FGVC."""


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("settings", [
    {}, {"path": "tokens"}, {"path": "keys"}, {"deep": False}, {"blocks": (0, 1)}, {"blocks": (1, 2), "carry": False},
    {"blocks": (1, 2), "carry": False, "path": "tokens"}, {"blocks": (-1, -2)}, {"blocks": (0, 3)},
    {"blocks": (1, 2), "deep": False}], ids=str)
def test_the_equation(settings, behind: bool):
    """Deep, shallow, the first, the last and some blocks; the class token is the same wherever prompts stand."""
    method = VPT(length=3, **settings)
    assert_same(tiny("vit", num_hidden_layers=4).double(), method, images("vit"), lambda m, x, v: m.classifier(
        stream(m, m.vit.embeddings(x), by_block(v), method.carry, behind)[0][:, 0]))


@pytest.mark.parametrize("pool", ["image", "prompt", "image+prompt"])
@pytest.mark.parametrize("deep", [False, True])
def test_what_the_head_reads(pool: str, deep: bool):
    def formula(model, x, values):
        h, n = stream(model, model.vit.embeddings(x), by_block(values))
        rows = {"image": h[:, 1 + n:], "prompt": h[:, 1:1 + n], "image+prompt": h[:, 1:]}[pool]
        return model.classifier(rows.mean(1))
    assert_same(tiny("vit").double(), VPT(length=3, pool=pool, deep=deep), images("vit"), formula)


def test_shallow_in_one_block_is_deep():
    found = [run(tiny("vit", num_hidden_layers=1).double(), VPT(length=3, deep=deep, dropout=0.0), images("vit"))
             for deep in (False, True)]
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_no_token_is_the_backbone():
    model, inputs = tiny("vit"), {"pixel_values": batch("vit")["pixel_values"]}
    plain = output(model, inputs)
    delta = st.attach(model, VPT(length=0))
    assert torch.equal(output(model, inputs), plain)
    assert (delta.count().adapter, delta.count().head) == (0, 99)


def test_a_prompt_for_all_blocks_and_a_projection():
    def formula(model, x, values):
        p = values["shared.vpt.prompt"] @ values["shared.vpt.project_32"].T + values["shared.vpt.bias_32"]
        return model.classifier(stream(model, model.vit.embeddings(x), {0: p, 1: p})[0][:, 0])
    assert_same(tiny("vit").double(), VPT(length=3, tied=True, project=5), images("vit"), formula)
    delta = st.attach(tiny("vit", hidden_size=256, num_attention_heads=4), VPT(length=50, project=8))
    assert delta.count().adapter == 2 * 50 * 8 + 256 * 8 + 256
    weight, bias = (delta.state()[f"shared.vpt.{n}_256"] for n in ("project", "bias"))
    assert weight.std().item() == pytest.approx((2 / 256)**0.5, rel=0.1)  # Kaiming's, by fan-out
    assert bias.abs().max() <= 8**-0.5
    prompt = delta.state()["vision.0.tokens.vpt.prompt"]
    assert prompt.abs().max() <= (6 / (48 + 8))**0.5


@pytest.mark.parametrize("location", ["add", "add-1"])
def test_vectors_added_to_tokens(location: str):
    def formula(model, x, values):
        h, prompts = model.vit.embeddings(x), by_block(values)
        for i, layer in enumerate(model.vit.layers):
            h = layer(h + prompts[i] if i in prompts else h)
        return model.classifier(model.vit.layernorm(h)[:, 0])
    assert_same(tiny("vit").double(), VPT(location=location), images("vit"), formula)
    assert_same(tiny("vit").double(), VPT(location=location, deep=False), images("vit"), formula)
    rows = {"add": 17, "add-1": 1}[location]
    assert st.attach(tiny("vit"), VPT(location=location, project=3, blocks=(1,))).count().adapter == (
        rows * 3 + 3 * 32 + 32)


# counts and starts


def test_the_published_counts():
    model = meta.vit_b16_meta()

    def adapter(length, **settings):
        delta = st.attach(model, VPT(length=length, **settings))
        count = delta.count()
        delta.detach()
        return count.adapter, count.backbone
    deep, shallow = ({n: adapter(n, deep=d)[0] for n in {*DEEP, *SHALLOW}} for d in (True, False))
    assert (shallow[50], deep[50]) == (38_400, 460_800)
    backbone, heads = adapter(1)[1], 1_624_897
    for length, classes, tuned, total in ((100, 10, 929_290, 86_727_946), (100, 6, 926_214, 86_724_870),
                                          (5, 397, 351_373, 86_150_029)):  # EuroSAT, DMLab, Sun397
        assert (deep[length] + 769 * classes, backbone + tuned) == (tuned, total)
    ratios = [1 + (sum(sizes[n] for n in lengths) + heads) / backbone
              for sizes, lengths in ((shallow, SHALLOW), (deep, DEEP))]
    assert [round(r, 2) for r in ratios] == [1.04, 1.18]
    assert adapter(2, deep=False, location="pad")[0] == 6 * 2 * (224 + 224 + 4)
    assert adapter(2, deep=False, location="below")[0] == 590_592 + 2 * 224 * 224 + 768 * 2 * 256
    assert adapter(2, deep=False, location="pixel")[0] == 2 * 768
    assert adapter(1, location="add")[0] == 12 * 197 * 768


def test_the_counts_on_swin():
    model = meta.swin_base_meta()
    for settings, numbers in (({}, 12_032), ({"deep": False}, 128)):
        delta = st.attach(model, VPT(length=1, **settings))
        assert delta.count().adapter == numbers
        delta.detach()


@pytest.mark.parametrize(("patch", "width", "bound"), [
    (16, 768, 0.0625), (16, 1024, 0.05786), (14, 1280, 0.05667), (4, 128, 0.18464)])
def test_the_start(patch: int, width: int, bound: float):
    site = PromptSite("vision", 0, "tokens", "", width, width, patch=3 * patch**2, embed=width)
    start = VPT(length=50).params(site)["prompt"].make(0, "prompt", torch.device("cpu"), torch.float32, None)
    assert start.shape == (50, width)
    assert bound * 0.99 < start.abs().max() <= bound + 5e-6
    assert start.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_the_start_in_every_stage_of_swin_is_the_first_ones():
    delta = st.attach(tiny("swin"), VPT(length=200))
    for p in (p for n, p in delta.state().items() if n.startswith("vision")):
        assert 0.98 < p.abs().max() / (6 / (3 * 2 * 2 + 16))**0.5 <= 1


@pytest.mark.parametrize(("init", "levels"), [
    ("class_inputs", (0, 1)), ("class_outputs", (1, 2)), ("class_final", (2, 2))])
def test_a_start_from_the_classes(init: str, levels):
    model, method = tiny("vit").train(), VPT(length=3, init=init)
    batches = [batch("vit", size=5, seed=s) for s in range(2)]
    pixels, labels = (torch.cat([b[k] for b in batches]) for k in ("pixel_values", "labels"))
    streams = [model.vit.embeddings(pixels)]
    for layer in model.vit.layers:
        streams.append(layer(streams[-1]))
    delta = st.attach(model, method)
    (own,) = delta.methods
    assert own.needs_data
    own.calibrate(delta, iter(batches))
    for block, level in enumerate(levels):
        wanted = torch.stack([streams[level][labels == c, 0].mean(0) for c in range(3)])
        torch.testing.assert_close(delta.state()[f"vision.{block}.tokens.vpt.prompt"], wanted)
    assert model.training
    other = st.attach(tiny("vit"), VPT(length=4, init=init))
    with pytest.raises(DataError, match="length=3"):
        other.methods[0].calibrate(other, batches)
    with pytest.raises(DataError, match="have none"):
        own.calibrate(delta, [{"pixel_values": pixels[:1], "labels": torch.tensor([2])}])


def test_the_classes_means_of_thousands_in_half_precision():
    """A sum in bfloat16 would end at 256."""
    model = tiny("vit").to(torch.bfloat16)
    one = batch("vit", size=1)["pixel_values"].to(torch.bfloat16)
    many = {"pixel_values": one.expand(1000, -1, -1, -1), "labels": torch.zeros(1000, dtype=torch.long)}
    tower = st.dissect(model).tower("vision")
    means = class_means(model, tower, [many] * 3)
    first = model.vit.embeddings(one)[0, 0]
    torch.testing.assert_close(means[0, 0], first.float(), atol=1e-5, rtol=1e-5)


# training


def test_what_trains_and_is_stored():
    delta = st.attach(tiny("vit"), VPT(length=3))
    assert set(delta.state()) == {"vision.0.tokens.vpt.prompt", "vision.1.tokens.vpt.prompt",
                                  "head.classifier.weight", "head.classifier.bias"}
    other = st.attach(tiny("vit"), VPT(length=3, path="tokens"))
    other.load_state(delta.state())  # one form of file for both ways


@pytest.mark.parametrize("settings", [{}, {"path": "tokens"}, {"location": "add"}], ids=str)
def test_dropout_differs_from_example_to_example(settings):
    model, inputs = tiny("vit"), {"pixel_values": batch("vit", size=1)["pixel_values"].expand(2, -1, -1, -1)}
    randomize(st.attach(model, VPT(length=3, dropout=0.5, **settings)))
    first, second = output(model, inputs)
    torch.testing.assert_close(first, second)
    first, second = output(model.train(), inputs)
    assert not torch.allclose(first, second)
    assert VPT().rate == 0.1
    assert VPT(deep=False).rate == 0.0


@pytest.mark.parametrize(("family", "settings", "word"), [
    ("bert", {}, "PromptTuning"), ("gpt2", {"location": "pad"}, "PromptTuning"), ("vit", {"init": "normal"}, "xavier"),
    ("vit", {"location": "pad"}, "deep=False"), ("vit", {"deep": False, "path": "keys"}, "carry=False"),
    ("vit", {"tied": True, "deep": False}, "tied"), ("swin", {"tied": True}, "width"),
    ("clip", {"pool": "image"}, "head"), ("vit", {"pool": "prompt", "blocks": (0,), "carry": False}, "carry=True"),
    ("vit", {"pool": "image+prompt", "blocks": (0,), "carry": False}, "carry=True"),
    ("swin", {"strip": False}, "stage"), ("vit", {"location": "add", "pool": "image"}, "pool"),
    ("vit", {"location": "pixel", "deep": False, "project": 3}, "project"), ("swin", {"init": "class_final"}, "class"),
    ("vit", {"location": "below", "deep": False, "blocks": (0,)}, "blocks")], ids=str)
def test_refusals(family: str, settings, word: str):
    with pytest.raises(MethodError, match=word):
        st.attach(tiny(family), VPT(length=3, **settings))


@pytest.mark.parametrize(("method", "family"), [
    (VPT(length=3, path="tokens"), "vit"), (VPT(length=3, deep=False, project=4), "clip"),
    (VPT(length=2, deep=False, location="pad"), "swin"), (VPT(length=2, deep=False, location="below"), "dinov2"),
    (VPT(location="add"), "deit"), (VPT(length=3, pool="image+prompt"), "vit")], ids=str)
def test_the_contract_in_other_forms(method: VPT, family: str):
    assert check_method(method, [family]).pairs[family].refusal is None
