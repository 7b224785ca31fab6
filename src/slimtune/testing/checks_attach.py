"""Checks of the configuration, of attaching and detaching, and of what trains."""
import torch

from slimtune.core.attach import attach
from slimtune.core.fingerprint import bits_digest
from slimtune.core.insert import CHILD
from slimtune.core.method import find, from_config, key_of, to_config
from slimtune.errors import DeltaError, MethodError
from slimtune.testing.case import (
    Case,
    Skip,
    base_values,
    check,
    differences,
    gradients,
    outline,
    refused,
    run,
    same,
    scramble,
    train,
    values,
)
from slimtune.testing.tiny import doubled, loss

NO_GRADIENT = 1e-9  # relative to the largest gradient, in float64: rounding is 1e-16


@check()
def config_is_frozen_and_validated(case: Case) -> None:
    """The configuration is frozen, and refuses unknown arguments and bad values."""
    method, cls = case.method, type(case.method)
    field = next(iter(cls.model_fields))
    with refused(Exception, f"setting {field}"):
        setattr(method, field, getattr(method, field))
    with refused(MethodError, "the unknown argument 'no_such_argument'"):
        cls(no_such_argument=1)
    for name in cls.model_fields:
        with refused(MethodError, f"{name}=object()"):
            cls(**{**method.model_dump(), name: object()})


@check()
def config_round_trip(case: Case) -> None:
    """from_config(to_config(method)) is the method, and its name is its own."""
    config = to_config(case.method)
    assert find(key_of(type(case.method))) is type(case.method), "another class has its name"
    assert from_config(config) == case.method, f"comes back as {from_config(config)!r}"


@check()
def yaml_round_trip(case: Case) -> None:
    """The configuration survives YAML, as data only."""
    import yaml

    text = yaml.safe_dump(to_config(case.method))
    assert from_config(yaml.safe_load(text)) == case.method, f"comes back as another method:\n{text}"


@check()
def base_is_unchanged(case: Case) -> None:
    """Attaching keeps the base's state-dict keys and values, bitwise; new keys stand under our children."""
    model = case.base()
    before, digest, mode = base_values(model), bits_digest(model), model.training
    delta = attach(model, case.method)
    same(base_values(model), before, "the base's state dict after attaching")
    scramble(delta)
    train(model, delta, case.inputs, 2)
    with delta.disabled():
        same(base_values(model), before, "the base's state dict after training")
        assert bits_digest(model) == digest, "the base's bits changed in training"
    assert model.training == mode, "attaching changed train/eval mode"


@check()
def identity_as_claimed(case: Case) -> None:
    """The output at the start is the backbone's, bitwise, if and only if the method claims it."""
    model, _ = case.attached()
    equal = torch.equal(run(model, case.inputs), case.plain)
    if case.method.starts_as_identity():
        assert equal, "it claims identity, and changes the output at its start"
    else:
        assert not equal, "it claims no identity, and leaves the output bitwise as it was"


@check()
def only_the_delta_trains(case: Case) -> None:
    """Exactly the delta's parameters require a gradient."""
    model, delta = case.attached()
    wanted = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    own = {id(p) for p in delta.parameters()}
    stray = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    assert not stray, f"these require a gradient and are not the delta's: {stray[:6]}"
    there = {id(p) for p in model.parameters()}
    lost = [n for n, p in delta.named_parameters() if id(p) not in there]
    assert not lost, f"these are the delta's and not in the model's parameters: {lost[:6]}"
    assert wanted, "nothing requires a gradient"


@check()
def every_tensor_gets_a_gradient(case: Case) -> None:
    """Every trained tensor gets a finite gradient at the first step, unless `silent` gives a reason."""
    model = case.base().double()
    delta = attach(model, case.method)
    inputs = doubled(case.inputs)
    loss(model, inputs).backward()
    first = gradients(delta)
    assert all(bool(g.isfinite().all()) for g in first.values()), "a gradient is not finite"
    quiet, why = _without(first), delta.resting()
    for seed in (1, 2) if any(n not in why for n in quiet) else ():  # a narrow ReLU may start all dead
        again = case.base().double()
        other = attach(again, case.method, seed=seed)
        loss(again, inputs).backward()
        quiet &= _without(gradients(other))
    reasons = {n: why.get(n, "") for n in quiet}
    unexplained = [n for n, reason in reasons.items() if not reason]
    assert not unexplained, f"no gradient at the first step, and no reason in `silent`: {unexplained[:6]}"
    if not quiet:
        return
    torch.optim.AdamW(delta.parameters(), lr=1e-2).step()
    model.zero_grad(set_to_none=True)
    loss(model, inputs).backward()
    still = sorted(_without(gradients(delta)) & quiet)
    for reason in dict.fromkeys(reasons[n] for n in still):
        names = [n for n in still if reasons[n] == reason]
        case.notes.append(f"{names[0]} {f'and {len(names) - 1} more ' if len(names) > 1 else ''}never move: {reason}")


def _without(grads: dict[str, torch.Tensor]) -> set[str]:
    largest = max(float(g.abs().max()) for g in grads.values())
    return {n for n, g in grads.items() if float(g.abs().max()) <= NO_GRADIENT * largest}


@check()
def loss_falls(case: Case) -> None:
    """Twenty steps of AdamW on one batch lower the loss, without the head where the method trains more."""
    for rate in (5e-3, 5e-4):  # a tiny model may overshoot at the first
        try:
            model, delta = case.attached(head="none")
        except MethodError:
            model, delta = case.attached()
        losses = train(model, delta, case.inputs, 20, rate)
        if losses[-1] < losses[0]:
            return
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.5f} to {losses[-1]:.5f}"


@check()
def count_is_the_sum(case: Case) -> None:
    """count() is the number of numbers by group, and the head's group follows `head`."""
    _, delta = case.attached()
    groups = {own.key: own.group for own in delta.owned}
    sums = {"adapter": 0, "norms": 0, "head": 0}
    for name, p in delta.named_parameters():
        sums[groups.get(name, "adapter")] += p.numel()
    count = delta.count()
    told = {g: getattr(count, g) for g in sums}
    assert told == sums, f"count() says {told}, and the tensors sum to {sums}"
    plain = case.base()
    heads = tuple(f"{h}." for h in delta.anatomy.heads)
    backbone = sum(p.numel() for n, p in plain.named_parameters() if not (heads and n.startswith(heads)))
    assert count.backbone == backbone, f"count().backbone is {count.backbone}, and the backbone has {backbone}"


@check()
def head_policy(case: Case) -> None:
    """head="freeze" keeps and saves the head untrained; head="none" leaves it out."""
    _, delta = case.attached()
    head = [n for n in delta.tensors() if n.startswith("head.")]
    if not head:
        raise Skip("the backbone has no task head")
    if len(head) == len(delta.tensors()):
        with refused(MethodError, "a delta that trains nothing"):
            case.attached(head="none")
        return
    _, frozen = case.attached(head="freeze")
    trained = {n for n, _ in frozen.named_parameters()}
    assert set(head) <= set(frozen.tensors()), "head='freeze' leaves the head out"
    assert not trained & set(head), "head='freeze' trains the head"
    _, bare = case.attached(head="none")
    assert not [n for n in bare.tensors() if n.startswith("head.")], "head='none' keeps a head"


@check()
def disabled_is_the_base(case: Case) -> None:
    """disabled() gives the backbone's output, bitwise, and the delta's again after it."""
    model, delta = case.moved()
    own = run(model, case.inputs)
    with delta.disabled():
        assert torch.equal(run(model, case.inputs), case.plain), "the output in disabled() is not the backbone's"
    assert torch.equal(run(model, case.inputs), own), "the output after disabled() is not the delta's"


@check()
def detach_leaves_nothing(case: Case) -> None:
    """detach() leaves no hook, child or attribute; the base's bits and requires_grad are as before."""
    model = case.base()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    before, digest = outline(model), bits_digest(model)
    delta = attach(model, case.method)
    scramble(delta)
    train(model, delta, case.inputs)
    delta.detach()
    assert not differences(before, outline(model)), f"changed at: {differences(before, outline(model))[:6]}"
    assert bits_digest(model) == digest, "the base's bits are not as before"
    assert torch.equal(run(model, case.inputs), case.plain), "the output is not the backbone's"
    assert not [m for m, _ in model.named_modules() if CHILD in m.split(".")], "a child stays"
    with refused(DeltaError, "using a detached delta"):
        delta.count()


@check()
def name_in_use_is_refused(case: Case) -> None:
    """Attaching a second delta of the same name raises DeltaError and changes nothing."""
    model, delta = case.moved()
    before, own = outline(model), run(model, case.inputs)
    with refused(DeltaError, "a second delta of the same name"):
        attach(model, case.method)
    assert not differences(before, outline(model)), f"changed at: {differences(before, outline(model))[:6]}"
    assert delta.active, "the first delta is no longer active"
    assert torch.equal(run(model, case.inputs), own), "the first delta no longer runs as before"


@check()
def seeded(case: Case) -> None:
    """The start depends on the seed alone: the global random state is neither read nor moved."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first = case.attached()
    assert torch.equal(torch.get_rng_state(), before), "attaching moved the global random state"
    torch.manual_seed(2)
    _, second = case.attached()
    same(values(first), values(second), "two starts from one seed")
