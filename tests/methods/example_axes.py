"""Parameters with an example axis against a loop over the examples."""
import torch

import slimtune as st
from slimtune.core import Bound, Method
from slimtune.testing import tiny

EXAMPLES, TOKENS = 3, 4


def assert_example_axes(method: Method, site: str = "encoder.0.attn.q", apart: tuple[str, ...] = ()) -> None:
    """Fail unless each parameter alone, and all together, may differ from example to example; gradients as well.

    apart: parameters that are not given an axis.
    """
    delta = st.attach(tiny("bert").double(), method)
    path, slot = next((path, slot) for path, slot in delta.slots if slot.site.name == site)
    host, generator = delta.model.get_submodule(path), torch.Generator().manual_seed(0)
    plain = {n: p.detach() if not p.is_floating_point() else torch.randn(p.shape, generator=generator).double()
             for n, p in slot._parameters.items()}
    x = torch.randn(EXAMPLES, TOKENS, slot.site.d_in, generator=generator).double()
    y = torch.randn(EXAMPLES, TOKENS, slot.site.d_out, generator=generator).double()
    trained = [n for n in plain if plain[n].is_floating_point() and n not in apart]
    for names in [[n] for n in trained] + [trained]:
        wide = {n: torch.randn(EXAMPLES, *plain[n].shape, generator=generator).double().requires_grad_() for n in names}
        out = slot.method.forward(Bound(plain | wide, slot.site, False, host), x, y.clone())
        wanted = torch.cat([
            slot.method.forward(Bound(plain | {n: t[i] for n, t in wide.items()}, slot.site, False, host),
                                x[i:i + 1], y[i:i + 1].clone()) for i in range(EXAMPLES)])
        torch.testing.assert_close(out, wanted)
        dy = torch.randn(out.shape, generator=generator).double()
        torch.testing.assert_close(torch.autograd.grad(out, list(wide.values()), dy),
                                   torch.autograd.grad(wanted, list(wide.values()), dy))
