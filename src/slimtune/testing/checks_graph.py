"""Checks of compiling, exporting and generating."""
import copy
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.side import Side
from slimtune.errors import MethodError
from slimtune.testing.case import Case, Skip, check, close, gradients, refused, run
from slimtune.testing.tiny import batch, kind, output

NEW_TOKENS = 3
STEPS = 1e-4  # of logits: a cache changes the order of sums


def _call(case: Case) -> dict[str, Any]:
    """A call without labels and cache; an encoder-decoder gets its decoder's ids instead of labels."""
    config: Any = case.base().config
    call: dict[str, Any] = {k: v for k, v in case.inputs.items() if k != "labels"}
    if config.is_encoder_decoder:
        call["decoder_input_ids"] = call["input_ids"].clone()
    return call | ({"use_cache": False} if "input_ids" in call and kind(case.backbone) != "clip" else {})


@check(slow=True)
def compiles(case: Case) -> None:
    """torch.compile (aot_eager) gives the same output and gradients, to 1e-5."""
    model, delta = case.moved()
    call, found = _call(case), []
    torch._dynamo.reset()
    for run_it in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad(set_to_none=True)
        out = output(run_it, call)  # type: ignore[arg-type]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), torch.cat([g.flatten() for g in gradients(delta).values()])))
    torch._dynamo.reset()
    close(found[1][0], found[0][0], "the compiled output")
    close(found[1][1], found[0][1], "the compiled gradients")


@check(slow=True)
def exports(case: Case) -> None:
    """torch.export (strict=False) gives the same output to 1e-5, where the backbone itself exports."""
    call = _call(case)
    model, _ = case.moved()
    own = run(model, call)
    try:
        program = _export(model, call)
    except Exception as problem:
        try:
            _export(case.base(), call)
        except Exception:
            raise Skip("the backbone does not export") from None
        raise AssertionError(f"the backbone exports, and with it: {type(problem).__name__}: {problem}") from problem
    with torch.no_grad():
        close(output(program.module(), call), own, "the exported output")


def _export(model: nn.Module, call: dict[str, Any]) -> Any:
    with torch.no_grad():
        return torch.export.export(model, (), call, strict=False)


@check()
def generates(case: Case) -> None:
    """Greedy generation equals a loop of argmax without a cache; a side network refuses a cache."""
    if kind(case.backbone) != "lm":
        raise Skip("the backbone does not generate")
    model, _ = case.moved()
    prompt = batch(case.backbone, size=2, labels=False)
    prompt = {k: v[:, :5] for k, v in prompt.items()}
    wanted = _greedy(model, prompt)
    close(_generate(model, prompt, use_cache=False), wanted, "the logits of generate() without a cache", STEPS)
    if isinstance(case.method, Side):
        with refused(MethodError, "a cache, of which the side network knows nothing"):
            _generate(model, prompt, use_cache=True)
        case.notes.append("generates without a cache only")
        close(_generate(model, prompt, use_cache=False), wanted, "the logits after the refusal", STEPS)
        return
    close(_generate(model, prompt, use_cache=True), wanted, "the logits of generate() with a cache", STEPS)


def _generate(model: Any, prompt: dict[str, Tensor], use_cache: bool) -> Tensor:
    """The logits of every greedy step, (B, NEW_TOKENS, V)."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, pad_token_id=1, output_logits=True,
                    eos_token_id=model.config.vocab_size, return_dict_in_generate=True)
    return torch.stack(model.generate(**prompt, generation_config=settings).logits, 1)


@torch.no_grad()
def _greedy(model: Any, prompt: dict[str, Tensor]) -> Tensor:
    """The same by argmax, each step a whole forward."""
    encoder_decoder = model.config.is_encoder_decoder
    key = "decoder_input_ids" if encoder_decoder else "input_ids"
    start = torch.full((2, 1), model.config.decoder_start_token_id) if encoder_decoder else prompt["input_ids"]
    ids, steps = start, []
    for _ in range(NEW_TOKENS):
        call = {**prompt, key: ids}
        if not encoder_decoder:
            call["attention_mask"] = torch.ones_like(ids)
        steps.append(model(**call, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(steps, 1)


@check()
def generates_from_left_padding(case: Case) -> None:
    """A prompt padded on the left continues as it does alone, where the backbone's own does."""
    if kind(case.backbone) != "lm" or case.base().config.is_encoder_decoder:  # type: ignore[union-attr]
        raise Skip("prompts are not padded on the left")
    ids = batch(case.backbone, size=2, labels=False)["input_ids"][:, :5]
    left, mask = ids.clone(), torch.ones_like(ids)
    left[1, :2], mask[1, :2] = 1, 0
    whole, alone = ({"input_ids": i, "attention_mask": m} for i, m in ((left, mask), (ids[1:, 2:], mask[1:, 2:])))
    for cached in (False,) if isinstance(case.method, Side) else (False, True):
        for what, model in (("the backbone", case.base()), ("the method", case.moved()[0])):
            padded, unpadded = (_generate(model, call, cached)[-1:] for call in (whole, alone))
            close(padded, unpadded, f"{what}, padded and alone, use_cache={cached}", STEPS)
