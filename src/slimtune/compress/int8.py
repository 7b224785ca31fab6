"""int8: an ONNX graph whose matrices are 8-bit numbers, what they read rounded to 8 bits at run time.

    w_ij ~ s_j q_ij,  q in -127 .. 127, a scale a column;    x ~ s (q - z),  q in 0 .. 255, a scale a matrix

Where sums of 8-bit products can overflow (see isa.py), weights have 7 bits.
"""
import os
from pathlib import Path

from slimtune.compress.extra import need, quiet
from slimtune.compress.isa import exact_int8
from slimtune.errors import SlimtuneError

OPERATORS = ("MatMul", "Gemm", "Gather")
"""Linear maps and tables of embeddings."""


def quantise_onnx(source: Path | str, target: Path | str, *, reduce_range: bool | None = None) -> None:
    """Write an int8 graph of a float32 one, by onnxruntime. reduce_range: 7 bits, by default where this CPU needs it.

    A file for another machine is made with reduce_range=True unless that one has VNNI.
    Errors: ExtraError; SlimtuneError for a file that is no graph of float32 maps.
    """
    tool, target = need("onnxruntime.quantization"), Path(target)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with quiet():
            tool.quantize_dynamic(str(source), str(beside), weight_type=tool.QuantType.QInt8, per_channel=True,
                                  reduce_range=not exact_int8() if reduce_range is None else reduce_range,
                                  op_types_to_quantize=list(OPERATORS))
        beside.replace(target)
    except Exception as error:  # onnx and onnxruntime have no kind in common
        raise SlimtuneError(f"{source}: onnxruntime cannot quantise it: {str(error).strip()[:300]}") from error
    finally:
        beside.unlink(missing_ok=True)
