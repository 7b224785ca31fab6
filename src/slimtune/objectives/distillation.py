"""Distillation: a small or pruned model learns from the outputs of a larger one.

    L = (1 - w) L_task + w tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau))

The mean is over examples, and over real tokens where there is an output for each. tau^2 keeps the size of the gradient
about the same for every tau.

Source: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2; as in Zafrir
et al., 2021, "Prune Once for All", arXiv 2111.05754, with w = 0.5 and tau = 2.
"""
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from slimtune.errors import MethodError

Objective: TypeAlias = Callable[[Mapping[str, Any], Any, Tensor], Tensor]
"""Of a batch, the model's outputs and its task loss: what is minimised."""


class Distillation(BaseModel):
    """How much is learnt from the teacher.

    teacher: a run's folder, a model's folder or a name, of the same labels and tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field(min_length=1, description="a finished run's folder, a model's folder, or a name")
    weight: float = Field(0.5, ge=0.0, le=1.0, description="w, the share of the teacher in the loss")
    temperature: float = Field(2.0, gt=0.0, description="tau")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """tau^2 KL(teacher || student), the mean over rows, in nats. Shapes: both (rows, classes).

    Errors: MethodError for other shapes.
    Example:
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> float(divergence(z, z)), round(float(divergence(-z, z, 1.0)), 4)
        (0.0, 1.5232)
    """
    if student.shape != teacher.shape:
        raise MethodError(f"the teacher gives outputs {tuple(teacher.shape)}, and the student {tuple(student.shape)}.",
                          "Choose a teacher with the same labels.")
    log_s, log_t = ((z.float() / temperature).log_softmax(-1) for z in (student, teacher))
    return nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


class Teacher:
    """A frozen model beside the one that trains: called with a batch, its outputs and its task loss, it gives L."""

    def __init__(self, model: nn.Module, spec: Distillation) -> None:
        self.model, self.spec = model.eval().requires_grad_(False), spec

    def __call__(self, inputs: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        seq2seq = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        plain = {key: value for key, value in inputs.items() if key != "labels" or seq2seq}  # its decoder reads them
        with torch.no_grad():
            known = self.model(**plain).logits
        student, known = _rows(outputs.logits, known, inputs, seq2seq)
        return (1 - self.spec.weight) * loss + self.spec.weight * divergence(student, known, self.spec.temperature)


def _rows(student: Tensor, teacher: Tensor, inputs: Mapping[str, Any], seq2seq: bool) -> tuple[Tensor, Tensor]:
    """One row an example, or a real token; a decoder's tokens are not those of attention_mask."""
    if student.dim() == 2 or student.shape != teacher.shape:
        return student, teacher
    mask = None if seq2seq else inputs.get("attention_mask")
    if mask is None or mask.shape != student.shape[:2]:
        labels = inputs.get("labels")
        mask = torch.ones(student.shape[:2]) if labels is None else labels != -100
    chosen = mask.bool().to(student.device)
    return student[chosen], teacher[chosen]
