"""Where each family of transformers 5 keeps its blocks and roles: data, no code.

A path is relative: a tower's to the base model, a block's roles to the block, the tower's own roles
to the tower. `a|b` tries a, then b; `path[i/n]` is the i-th of n equal slices of a fused projection;
`*` in `blocks` and `biases` is any index (stages of a hierarchical model). A role whose path a model does not
have is left out (T5's gate exists in v1.1 only).
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TowerSpec:
    """One tower of a family.

    path: from the base model; blocks: the list of blocks; embed: token or patch embedding;
    entry: the module whose output is the first block's input, where one exists;
    final: the module whose output is the tower's hidden state, when it is not the last block;
    roles: role -> path from a block; tower_roles: role -> path from the tower;
    post_norm: the norms follow the residual sum, as in BERT; causal: as in GPT-2;
    prefix_tokens: tokens before the patches (class, distillation, registers) in a vision tower;
    registers: the config's number of registers, which come behind those of `prefix_tokens`;
    grid: the token grid changes between stages, as in Swin;
    biases: modules whose output is added to the attention's scores, a row and a column for each token, as BEiT's;
    pools: a task head reads the first token behind `final`, and nothing else;
    heads: names of task heads inside the base model.
    """

    tower: str
    path: str
    blocks: str
    embed: str
    roles: dict[str, str]
    entry: str | None = None
    final: str | None = None
    tower_roles: dict[str, str] = field(default_factory=dict)
    post_norm: bool = False
    causal: bool = False
    prefix_tokens: int = 0
    registers: str | None = None
    grid: bool = False
    biases: str | None = None
    pools: bool = False
    heads: tuple[str, ...] = ()


def attention(prefix: str, q: str, k: str, v: str, o: str, cross: bool = False) -> dict[str, str]:
    """The four projections of an attention under `prefix`; `cross` for the encoder-decoder one."""
    name = "cross.attn." if cross else "attn."
    dot = prefix + "." if prefix else ""
    return {name + "q": dot + q, name + "k": dot + k, name + "v": dot + v, name + "o": dot + o}


def _bert(q: str = "query", k: str = "key", v: str = "value", inner: str = "attention.self",
          o: str = "attention.output.dense", attn_norm: str = "attention.output.LayerNorm",
          attn_out: str = "attention.output.dropout", entry: str = "embeddings") -> TowerSpec:
    """The BERT plan: residual sums and norms inside `output` modules, dropout a module of its own."""
    inner_roles = attention(inner, q, k, v, "o")
    roles = {**inner_roles, "attn.o": o, "attn": attn_out, "mlp.up": "intermediate.dense",
             "mlp.down": "output.dense", "mlp": "output.dropout",
             "norm.attn": attn_norm, "norm.mlp": "output.LayerNorm"}
    return TowerSpec("encoder", "", "encoder.layer", "embeddings.word_embeddings", roles, entry=entry,
                     tower_roles={"norm.embed": "embeddings.LayerNorm"}, post_norm=True)


def _llama() -> TowerSpec:
    roles = {**attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
             "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj",
             "norm.attn": "input_layernorm", "norm.mlp": "post_attention_layernorm"}
    return TowerSpec("decoder", "", "layers", "embed_tokens", roles, final="norm",
                     tower_roles={"norm.final": "norm"}, causal=True)


def _t5(tower: str) -> TowerSpec:
    names = ("q", "k", "v", "o")
    roles = {**attention("layer.0.SelfAttention", *names), "norm.attn": "layer.0.layer_norm"}
    ffn = "layer.1"
    if tower == "decoder":
        roles |= {**attention("layer.1.EncDecAttention", *names, cross=True), "norm.cross": "layer.1.layer_norm"}
        ffn = "layer.2"
    dense = f"{ffn}.DenseReluDense."
    roles |= {"mlp.up": f"{dense}wi|{dense}wi_1", "mlp.gate": f"{dense}wi_0", "mlp.down": f"{dense}wo",
              "norm.mlp": f"{ffn}.layer_norm"}
    return TowerSpec(tower, tower, "block", "embed_tokens", roles, final="final_layer_norm",
                     tower_roles={"norm.final": "final_layer_norm"}, causal=tower == "decoder")


def _bart(tower: str, root: str = "", post_norm: bool = True) -> TowerSpec:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    roles = {**attention("self_attn", *names), "norm.attn": "self_attn_layer_norm",
             "mlp.up": "fc1", "mlp.down": "fc2", "norm.mlp": "final_layer_norm"}
    if tower == "decoder":
        roles |= {**attention("encoder_attn", *names, cross=True), "norm.cross": "encoder_attn_layer_norm"}
    tower_roles = {"norm.embed": "layernorm_embedding"} if post_norm else {"norm.final": "layer_norm"}
    return TowerSpec(tower, root + tower, "layers", "embed_tokens", roles, post_norm=post_norm,
                     final=None if post_norm else "layer_norm", tower_roles=tower_roles,
                     causal=tower == "decoder")


def _vit(blocks: str = "layers", norms: tuple[str, str] = ("layernorm_before", "layernorm_after"),
         prefix_tokens: int = 1, final: str | None = "layernorm", **more) -> TowerSpec:
    roles = {**attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
             "mlp.up": "mlp.fc1|mlp.up_proj|mlp.weights_in", "mlp.gate": "mlp.gate_proj",
             "mlp.down": "mlp.fc2|mlp.down_proj|mlp.weights_out",
             "norm.attn": norms[0], "norm.mlp": norms[1]}
    return TowerSpec("vision", "", blocks, "embeddings.patch_embeddings.projection", roles, entry="embeddings",
                     final=final, tower_roles={"norm.final": "layernorm|pooler.layernorm"},
                     prefix_tokens=prefix_tokens, **more)


def _clip(tower: str, path: str) -> TowerSpec:
    roles = {**attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), "mlp.up": "mlp.fc1",
             "mlp.down": "mlp.fc2", "norm.attn": "layer_norm1", "norm.mlp": "layer_norm2"}
    if tower == "vision":
        return TowerSpec(tower, path, "encoder.layers", "embeddings.patch_embedding", roles, entry="pre_layrnorm",
                         tower_roles={"norm.embed": "pre_layrnorm", "norm.final": "post_layernorm"},
                         prefix_tokens=1)
    return TowerSpec(tower, path, "encoder.layers", "embeddings.token_embedding", roles, entry="embeddings",
                     tower_roles={"norm.final": "final_layer_norm"}, causal=True)


_GPT2 = TowerSpec(
    "decoder", "", "h", "wte",
    {"attn.q": "attn.c_attn[0/3]", "attn.k": "attn.c_attn[1/3]", "attn.v": "attn.c_attn[2/3]",
     "attn.o": "attn.c_proj", "attn": "attn.resid_dropout", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
     "mlp": "mlp.dropout", "norm.attn": "ln_1", "norm.mlp": "ln_2"},
    final="ln_f", tower_roles={"norm.final": "ln_f"}, causal=True)

_DISTILBERT = TowerSpec(
    "encoder", "", "transformer.layer", "embeddings.word_embeddings",
    {**attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"), "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2",
     "mlp": "ffn.dropout", "norm.attn": "sa_layer_norm", "norm.mlp": "output_layer_norm"},
    entry="embeddings", tower_roles={"norm.embed": "embeddings.LayerNorm"}, post_norm=True)

_CONVNEXT = TowerSpec(  # its MLPs are linear maps with the channels last
    "vision", "", "encoder.stages.*.layers", "embeddings.patch_embeddings",
    {"mlp.up": "pwconv1", "mlp.down": "pwconv2", "norm.mlp": "layernorm"}, entry="embeddings", final="layernorm",
    tower_roles={"norm.final": "layernorm"}, grid=True)
_RESNET = TowerSpec("vision", "", "encoder.stages.*.layers", "embedder.embedder.convolution", {}, entry="embedder",
                    grid=True)

_MPNET = _bert("q", "k", "v", "attention.attn", "attention.attn.o", "attention.LayerNorm", "attention.dropout")
_DEBERTA = _bert("query_proj", "key_proj", "value_proj")

FAMILIES: dict[str, tuple[TowerSpec, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), (_bert(),)),
    "electra": (_bert(entry="embeddings_project|embeddings"),),
    "distilbert": (_DISTILBERT,),
    "mpnet": (_MPNET,),
    "deberta-v2": (_DEBERTA,),
    "gpt2": (_GPT2,),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), (_llama(),)),
    **dict.fromkeys(("t5", "mt5"), (_t5("encoder"), _t5("decoder"))),
    "bart": (_bart("encoder"), _bart("decoder")),
    "mbart": (_bart("encoder", post_norm=False), _bart("decoder", post_norm=False)),
    "whisper": (_bart("encoder", post_norm=False), _bart("decoder", post_norm=False)),
    "vit": (_vit(pools=True),),
    "deit": (_vit(prefix_tokens=2, pools=True),),
    "beit": (_vit(biases="shared_position_bias|layers.*.relative_position_bias"),),
    "dinov2": (_vit("encoder.layer", ("norm1", "norm2")),),
    "dinov2_with_registers": (_vit("encoder.layer", ("norm1", "norm2"), registers="num_register_tokens"),),
    "swin": (_vit("encoder.layers.*.blocks", prefix_tokens=0, grid=True),),
    **dict.fromkeys(("convnext", "convnextv2"), (_CONVNEXT,)),
    "resnet": (_RESNET,),
    "clip": (_clip("text", "text_model"), _clip("vision", "vision_model")),
    "clip_text_model": (_clip("text", ""),),
    "clip_vision_model": (_clip("vision", ""),),
}

TIMM = TowerSpec(
    "vision", "", "blocks", "patch_embed.proj",
    {"attn.q": "attn.qkv[0/3]", "attn.k": "attn.qkv[1/3]", "attn.v": "attn.qkv[2/3]", "attn.o": "attn.proj",
     "attn": "attn.proj_drop|attn.proj", "mlp.up": "mlp.fc1|mlp.fc1_x", "mlp.gate": "mlp.fc1_g",
     "mlp.down": "mlp.fc2", "mlp": "mlp.drop2|mlp.fc2", "norm.attn": "norm1", "norm.mlp": "norm2"},
    entry="norm_pre|pos_drop", final="norm", tower_roles={"norm.embed": "norm_pre", "norm.final": "norm|fc_norm"},
    heads=("head", "head_dist"))
"""A ViT of timm, which has no model_type: see `guess.timm_tower`."""

PRETRAINED_HEADS = frozenset({
    "lm_head", "cls", "proj_out", "generator_predictions", "generator_lm_head", "discriminator_predictions",
    "vocab_transform", "vocab_layer_norm", "vocab_projector", "visual_projection", "text_projection",
    "lm_predictions",
})
"""Modules beside the base model that are pretrained with it, and so are backbone, not task head."""

TASK_HEADS = frozenset({"classifier", "score", "qa_outputs", "classification_head"})
"""Heads beside the towers of a model that is its own base, as T5's."""
