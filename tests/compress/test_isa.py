"""Instruction sets, from what CPUs say of themselves."""
import pytest
import torch

from slimtune.compress import isa
from slimtune.compress.isa import exact_int8, instruction_sets

ZEN4 = "processor : 0\nflags\t\t: fpu sse2 avx2 avx512f avx512dq avx512_vnni avx512_bf16\nbugs : none"
ZEN2 = "flags\t\t: fpu sse2 avx avx2 fma"
ALDER = "flags\t\t: fpu avx2 avx_vnni"
SAPPHIRE = "flags : avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
GRAVITON = "Features\t: fp asimd aes asimddp i8mm"


@pytest.mark.parametrize(("text", "sets", "exact"), [
    (ZEN4, ("avx2", "avx512", "avx512_vnni", "avx512_bf16"), True), (ZEN2, ("avx2",), False),
    (ALDER, ("avx2", "avx_vnni"), True), (GRAVITON, ("neon", "dotprod", "i8mm"), True), ("", (), False),
    (SAPPHIRE, ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"), True),
])
def test_of_known_machines(text, sets, exact):
    assert instruction_sets(text) == sets
    assert exact_int8(sets) is exact


def test_without_proc_torch_is_asked(monkeypatch):
    monkeypatch.setattr(isa.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError))
    monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert instruction_sets() == ("avx2",)
    monkeypatch.setattr(isa.platform, "machine", lambda: "arm64")
    assert exact_int8()
