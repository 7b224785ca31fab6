"""Sites whose module is the linear map itself, so that its weight is what x becomes y by."""
from slimtune.core.sites import Site
from slimtune.errors import MethodError


def need_linear(site: Site, who: str) -> None:
    """Fail unless y = W x + b at the site, with W the weight of its own module.

    The sub-layers (`attn`, `mlp`, `block`) read one module and change another; norms, embeddings and inputs
    have no such W.
    Errors: MethodError.
    """
    if site.at == "output" and site.source is None and site.role.startswith(("attn.", "mlp.")):
        return
    raise MethodError(f"{who} works on the weight of a linear map, which '{site.name}' has not.",
                      "Choose linear sites: attn.q attn.k attn.v attn.o mlp.up mlp.gate mlp.down.")
