"""Does the real `adapters` library load what slimtune writes, to the same logits? Run by hand, in two environments:

    .venv/bin/python tests/io/adapterhub/check_export.py OUT           # slimtune writes folders and its logits
    ADAPTERS/bin/python tests/io/adapterhub/check_export.py OUT        # adapters loads them and compares

It writes every fixture that slimtune reads, once more, and deltas of slimtune's own.
"""
import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

HOME = Path(__file__).parent
FAMILIES = ("bert", "roberta", "gpt2", "t5", "bart", "vit")
REFUSED = {("t5", "prefix")}


def base(family):
    config = tf.AutoConfig.from_pretrained(HOME / family / "base")
    cls = getattr(tf, config.architectures[0])
    return cls.from_pretrained(HOME / family / "base", attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, family):
    values = load_file(HOME / family / "expected.safetensors")
    return model(**{k.removeprefix("inputs."): v for k, v in values.items() if k.startswith("inputs.")}).logits


def own():
    """Unions of slimtune's methods, by name."""
    from slimtune import methods as m

    plain = {"norms": "none"}
    return {
        "own_houlsby": [m.Houlsby(bottleneck=3, layer_norm="out", **plain)],
        "own_upper": [m.Houlsby(bottleneck=2, blocks=(-1,), scale=0.5, **plain)],
        "own_pfeiffer": [m.Pfeiffer(bottleneck=3, layer_norm="in")],
        "own_scaled": [m.ScaledParallelAdapter(bottleneck=2, scale=2.0, learned_scale=True, activation="gelu")],
        "own_beside": [m.ParallelAdapter(bottleneck=2, sites=("self.attn",))],
        "own_stream": [m.get("stream_adapter")(bottleneck=3, sites=("self.attn", "mlp"))],
        "own_stream_beside": [m.get("stream_adapter")(bottleneck=3, form="parallel", activation="silu")],
        "own_stream_compacter": [m.get("stream_compacter")(bottleneck=4, division=2, **plain)],
        "own_compacter": [m.Compacter(bottleneck=4, division=2, rank=2, **plain)],
        "own_phm": [m.PHMAdapter(bottleneck=4, division=2, **plain)],
        "own_widths": [m.BottleneckAdapter(bottleneck=2, sites=("self.attn",)), m.BottleneckAdapter(bottleneck=5)],
        "own_lora": [m.LoRA(rank=2, alpha=3.0, rslora=True, sites=("attn.q", "attn.k", "mlp.down"))],
        "own_ia3": [m.IA3(sites=("attn.k", "attn.v", "mlp.up"))],
        "own_prefix": [m.PrefixTuning(length=2, hidden=4)],
        "own_self_prefix": [m.PrefixTuning(length=2, sites=("self.attn",), blocks=(0,))],
        "own_union": [m.PrefixTuning(length=2), m.LoRA(rank=2), m.Houlsby(bottleneck=2, **plain)],
    }


def write(out):
    import slimtune
    from slimtune.errors import SlimtuneError
    from slimtune.io.adapterhub import save_adapterhub

    for family in FAMILIES:
        wanted = {}
        for case in sorted(p.parent.name for p in (HOME / family).glob("*/adapter_config.json")):
            if (family, case) not in REFUSED:
                delta = slimtune.load(base(family), HOME / family / case)
                save_adapterhub(delta, out / family / case)
                wanted[case] = logits(delta.model, family)
        for case, union in own().items():
            delta = slimtune.attach(base(family), union, name=case)
            with torch.no_grad():
                g = torch.Generator().manual_seed(1)
                for p in delta.parameters():
                    p.add_(torch.randn(p.shape, generator=g) * 0.3)
            try:
                save_adapterhub(delta, out / family / case)
                wanted[case] = logits(delta.model, family)
            except SlimtuneError as error:
                print(f"{family} {case}: not written: {error.what}")
        save_file({k: v.contiguous() for k, v in wanted.items()}, out / family / "logits.safetensors")


def check(out):
    import adapters

    worst, count = 0.0, 0
    for family in FAMILIES:
        for case, want in load_file(out / family / "logits.safetensors").items():
            model, info = base(family), {}
            own_class = (out / family / case / "head_config.json").is_file() and "AdapterModel" in (
                out / family / case / "head_config.json").read_text()
            if own_class:  # a head of the library's own classes
                model = adapters.AutoAdapterModel.from_pretrained(HOME / family / "base", attn_implementation="eager")
                model.eval()
            else:
                adapters.init(model)
            model.load_adapter(str(out / family / case), use_safetensors=True, set_active=True, loading_info=info)
            gap = float((logits(model, family) - want).abs().max())
            missing = [k for k in info["missing_keys"] if ".pool." not in k]  # copies of a prefix under each layer
            assert (missing, info["unexpected_keys"]) == ([], []), (family, case)
            assert not torch.allclose(want, logits(base(family), family), atol=1e-3), (family, case)
            assert gap < 1e-5, (family, case, gap)
            worst, count = max(worst, gap), count + 1
    print(f"{count} folders of slimtune load in adapters {adapters.__version__}: logits differ by at most {worst:.1e}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    (check if importlib.util.find_spec("adapters") else write)(Path(sys.argv[1]))
