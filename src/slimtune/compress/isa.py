"""isa: the instruction sets of this CPU that decide what int8 is worth.

Products of 8-bit numbers are summed in 32 bits by one instruction where a CPU has VNNI. Without it (AVX2, plain
AVX-512) pairs of them are first summed in 16 bits, which overflow: weights are then kept to 7 bits.
"""
import platform
from pathlib import Path

_FLAGS = {"avx2": "avx2", "avx512f": "avx512", "avx_vnni": "avx_vnni", "avx512_vnni": "avx512_vnni",
          "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8", "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm"}
"""What /proc/cpuinfo calls a set, on x86 and on ARM, and its name here."""
_EXACT = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm"})


def instruction_sets(cpuinfo: str | None = None) -> tuple[str, ...]:
    """The sets that this CPU has; outside Linux, what torch says of it.

    cpuinfo: the text of /proc/cpuinfo, by default this machine's.
    Example:
        >>> instruction_sets("flags : fpu avx2 avx512f avx512_vnni")
        ('avx2', 'avx512', 'avx512_vnni')
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            return _by_torch()
    flags = {word for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))
             for word in line.partition(":")[2].split()}
    return tuple(name for flag, name in _FLAGS.items() if flag in flags)


def _by_torch() -> tuple[str, ...]:
    import torch

    found = torch.backends.cpu.get_cpu_capability().lower()
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return ("neon", "dotprod") if arm else {"avx2": ("avx2",), "avx512": ("avx2", "avx512")}.get(found, ())


def exact_int8(sets: tuple[str, ...] | None = None) -> bool:
    """Whether sums of 8-bit products cannot overflow: with VNNI, AMX or ARM's dot product.

    Example:
        >>> exact_int8(("avx2", "avx512")), exact_int8(("avx2", "avx_vnni"))
        (False, True)
    """
    return bool(_EXACT & set(instruction_sets() if sets is None else sets))
