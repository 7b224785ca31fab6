"""Prompt tuning against its paper: [P; embed(x)] in, the prompt's outputs off, on each kind of backbone."""
import torch

import slimtune as st
from slimtune.testing import batch, doubled, output, randomize, tiny


def prompted(family: str):
    """Plain model, inputs, prompt, and what the method gives on them."""
    model = tiny(family).double()
    inputs = doubled(batch(family))
    delta = randomize(st.attach(model, st.methods.PromptTuning(length=3, head="none")))
    own, prompt = output(model, inputs), next(iter(delta.state().values()))
    assert delta.count().adapter == 3 * 32
    delta.detach()
    return model, inputs, prompt.expand(3, -1, -1), own


def open_mask(mask, extra=3):
    return torch.cat([torch.ones(mask.shape[0], extra, dtype=mask.dtype), mask], 1)


def test_a_classifier_pools_the_text_behind_the_prompt():
    model, inputs, prompt, own = prompted("bert")
    embeds = torch.cat([prompt, model.bert.embeddings.word_embeddings(inputs["input_ids"])], 1)
    hidden = model.bert(inputs_embeds=embeds, attention_mask=open_mask(inputs["attention_mask"])).last_hidden_state
    torch.testing.assert_close(model.classifier(model.bert.pooler(hidden[:, 3:])), own)


def test_a_decoder_gives_the_logits_of_the_text():
    model, inputs, prompt, own = prompted("gpt2")
    embeds = torch.cat([prompt, model.transformer.wte(inputs["input_ids"])], 1)
    logits = model(inputs_embeds=embeds, attention_mask=open_mask(inputs["attention_mask"])).logits
    torch.testing.assert_close(logits[:, 3:], own)


def test_a_decoder_attends_to_the_encoders_prompt():
    model, inputs, prompt, own = prompted("t5")
    mask = open_mask(inputs["attention_mask"])
    embeds = torch.cat([prompt, model.shared(inputs["input_ids"])], 1)
    memory = model.encoder(inputs_embeds=embeds, attention_mask=mask)
    torch.testing.assert_close(model(encoder_outputs=memory, attention_mask=mask, labels=inputs["labels"]).logits, own)


def test_a_vision_tower_has_it_behind_the_class_token():
    model, inputs, prompt, own = prompted("vit")
    hidden = model.vit.embeddings(inputs["pixel_values"])
    hidden = torch.cat([hidden[:, :1], prompt, hidden[:, 1:]], 1)
    for layer in model.vit.layers:
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    torch.testing.assert_close(model.classifier(model.vit.layernorm(hidden)[:, 0]), own)


def test_gradients_are_those_of_the_embeddings():
    model, inputs = tiny("gpt2").double(), batch("gpt2")
    delta = randomize(st.attach(model, st.methods.PromptTuning(length=3)))
    output(model, inputs).square().sum().backward()
    (found,) = (p.grad for p in delta.parameters())
    prompt = next(iter(delta.state().values())).clone().requires_grad_()
    delta.detach()
    embeds = torch.cat([prompt.expand(3, -1, -1), model.transformer.wte(inputs["input_ids"])], 1)
    logits = model(inputs_embeds=embeds, attention_mask=open_mask(inputs["attention_mask"])).logits
    (wanted,) = torch.autograd.grad(logits[:, 3:].square().sum(), prompt)
    torch.testing.assert_close(found, wanted)


def test_the_start():
    state = st.attach(tiny("t5"), st.methods.PromptTuning(length=50)).state()
    (prompt,) = state.values()
    assert prompt.abs().max() <= 0.5
    assert prompt.std() > 0.25
    (prompt,) = st.attach(tiny("t5"), st.methods.PromptTuning(length=50, init="normal")).state().values()
    assert 0.015 < prompt.std() < 0.025
