"""Loyalty: how far a compressed model says what the model it came from says, right or wrong.

    label        Acc(argmax t, argmax s)
    probability  mean over examples of 1 - sqrt(JS(P_t || P_s)),  JS = (KL(P_t || M) + KL(P_s || M)) / 2,
                 M = (P_t + P_s) / 2, logarithms to base 2, so that it lies between 0 and 1

Source: Xu et al., 2021, "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression",
arXiv 2109.03228.
"""
import torch
from torch import Tensor

from slimtune.errors import DataError


def label_loyalty(teacher: Tensor, student: Tensor) -> float:
    """The share of examples on which both choose the same class.

    Shapes: logits or probabilities, (N, C), C > 1. Errors: DataError for other shapes, or what is not finite.

    Example:
        >>> label_loyalty(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.2, 0.3], [0.2, 0.3]]))
        0.5
    """
    _check(teacher, student)
    return float((teacher.argmax(-1) == student.argmax(-1)).double().mean())


def probability_loyalty(teacher: Tensor, student: Tensor) -> float:
    """1 less the Jensen-Shannon distance of the two distributions, the mean over examples.

    The distance is the root of the divergence already: no second one is taken.
    Shapes: logits, (N, C), C > 1. Errors: as `label_loyalty`.

    Example:
        >>> sure = torch.tensor([[1e4, 0.0]])
        >>> probability_loyalty(sure, sure), probability_loyalty(sure, -sure)
        (1.0, 0.0)
    """
    _check(teacher, student)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = (p + q) / 2
    divergence = (_kl(p, m) + _kl(q, m)) / 2
    return float(1 - divergence.clamp(0, 1).sqrt().mean())


def _kl(p: Tensor, m: Tensor) -> Tensor:
    """KL divergence in bits; 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, m)).sum(-1) / torch.log(torch.tensor(2.0, dtype=p.dtype))


def _check(teacher: Tensor, student: Tensor) -> None:
    if teacher.shape != student.shape or teacher.dim() != 2 or not len(teacher) or teacher.shape[1] < 2:
        raise DataError(f"loyalty compares outputs of (examples, classes); these are {tuple(teacher.shape)} and "
                        f"{tuple(student.shape)}.", "Give the logits of both models on the same examples.")
    if not (teacher.isfinite().all() and student.isfinite().all()):
        raise DataError("loyalty: an output is NaN or infinite.", "Look at the model that gave it.")
