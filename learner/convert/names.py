"""Which Hugging Face tensors make up which Megatron-Core tensor, for every family.

The trained model (`rules`) and the layers for multi-token prediction (`mtp_rules`), which are not
trained and are copied from checkpoint to checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

from learner.convert.hybrid import hybrid_rules
from learner.convert.layouts import delta_net_input, query_key_value
from learner.convert.rule import Part, Rule
from learner.model.shape import LatentAttention, Layer, Shape


def rules(shape: Shape) -> Iterator[Rule]:
    """Every tensor of the trained model exactly once, in the order of export."""
    if shape.hybrid is not None:
        yield from hybrid_rules(shape)
        return
    width = shape.hidden_size
    vocabulary = (shape.vocab_size, width)
    yield _rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", *vocabulary)
    for number, layer in enumerate(shape.layers):
        yield from _layer(shape, layer, f"decoder.layers.{number}.", f"model.layers.{number}.")
    yield _rule("decoder.final_layernorm.weight", "model.norm.weight", width)
    if not shape.tied:
        yield _rule("output_layer.weight", "lm_head.weight", *vocabulary)


def mtp_rules(shape: Shape) -> Iterator[Rule]:
    """Every tensor of the layers for multi-token prediction that a checkpoint of `shape` may have.

    Qwen3-Next's config.json does not say whether they are there; published DeepSeek checkpoints
    leave them out as often as not.
    """
    for number in range(shape.mtp_layers):
        if shape.family == "deepseek_v3":
            yield from _deepseek_mtp(
                shape, f"mtp.layers.{number}.", f"model.layers.{len(shape.layers) + number}."
            )
        else:
            yield from _qwen_mtp(shape, f"mtp.layers.{number}.")


def hf_shapes(shape: Shape, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of export.

    `mtp` asks for the tensors of multi-token prediction instead.
    """
    return {part.name: part.shape for rule in (mtp_rules if mtp else rules)(shape) for part in rule.parts}


def _qwen_mtp(shape: Shape, ours: str) -> Iterator[Rule]:
    width = shape.hidden_size
    yield _rule(ours + "eh_proj.weight", "mtp.fc.weight", width, 2 * width)
    yield _rule(ours + "enorm.weight", "mtp.pre_fc_norm_embedding.weight", width)
    yield _rule(ours + "hnorm.weight", "mtp.pre_fc_norm_hidden.weight", width)
    layer = Layer(delta_net=False, experts=True)
    yield from _layer(shape, layer, ours + "mtp_model_layer.", "mtp.layers.0.")
    yield _rule(ours + "final_layernorm.weight", "mtp.norm.weight", width)


def _deepseek_mtp(shape: Shape, ours: str, theirs: str) -> Iterator[Rule]:
    width, vocabulary = shape.hidden_size, (shape.vocab_size, shape.hidden_size)
    yield _rule(ours + "eh_proj.weight", theirs + "eh_proj.weight", width, 2 * width)
    yield _rule(ours + "enorm.weight", theirs + "enorm.weight", width)
    yield _rule(ours + "hnorm.weight", theirs + "hnorm.weight", width)
    layer = Layer(delta_net=False, experts=True)
    yield from _layer(shape, layer, ours + "mtp_model_layer.", theirs)
    yield _rule(ours + "final_layernorm.weight", theirs + "shared_head.norm.weight", width)
    # Copies of the model's own, which Megatron-Core shares instead.
    yield _rule(ours + "embed_tokens.weight", theirs + "embed_tokens.weight", *vocabulary)
    yield _rule(ours + "shared_head.weight", theirs + "shared_head.head.weight", *vocabulary)


def _layer(shape: Shape, layer: Layer, ours: str, theirs: str) -> Iterator[Rule]:
    if layer.delta_net:
        yield from _delta_net(shape, ours, theirs)
    elif isinstance(shape.attention, LatentAttention):
        yield from _latent_attention(shape, ours, theirs)
    else:
        yield from _attention(shape, ours, theirs)
    norm = ours + ("pre_mlp_layernorm.weight" if layer.experts else "mlp.linear_fc1.layer_norm_weight")
    yield _rule(norm, theirs + "post_attention_layernorm.weight", shape.hidden_size)
    if layer.experts:
        yield from _experts(shape, ours + "mlp.", theirs + "mlp.")
    else:
        yield from _mlp(shape, shape.dense_width, ours + "mlp.", theirs + "mlp.")


def _attention(shape: Shape, ours: str, theirs: str) -> Iterator[Rule]:
    attention, width = shape.attention, shape.hidden_size
    ours, norm, theirs = ours + "self_attention.", theirs + "input_layernorm.weight", theirs + "self_attn."
    query, keys = attention.heads * attention.head_dim, attention.groups * attention.head_dim
    rows = {"q": query * (2 if attention.gated else 1), "k": keys, "v": keys}
    parts = tuple(Part(f"{theirs}{name}_proj.weight", (count, width)) for name, count in rows.items())
    yield _rule(ours + "linear_qkv.layer_norm_weight", norm, width)
    yield Rule(ours + "linear_qkv.weight", parts, order=query_key_value(attention))
    yield _rule(ours + "q_layernorm.weight", theirs + "q_norm.weight", attention.head_dim)
    yield _rule(ours + "k_layernorm.weight", theirs + "k_norm.weight", attention.head_dim)
    yield _rule(ours + "linear_proj.weight", theirs + "o_proj.weight", width, query)


def _delta_net(shape: Shape, ours: str, theirs: str) -> Iterator[Rule]:
    net, width = shape.delta_net, shape.hidden_size
    ours, norm, theirs = ours + "self_attention.", theirs + "input_layernorm.weight", theirs + "linear_attn."
    keys, values, heads = net.key_heads * net.key_dim, net.value_heads * net.value_dim, net.value_heads
    convolved = (("query", keys), ("key", keys), ("value", values))
    yield _rule(ours + "in_proj.layer_norm_weight", norm, width)
    yield Rule(
        ours + "in_proj.weight",
        (
            Part(theirs + "in_proj_qkvz.weight", (2 * keys + 2 * values, width)),
            Part(theirs + "in_proj_ba.weight", (2 * heads, width)),
        ),
        order=delta_net_input(net),
        sections=(*convolved, ("z", values), ("beta", heads), ("alpha", heads)),
    )
    channels = Part(theirs + "conv1d.weight", (2 * keys + values, 1, net.kernel))
    yield Rule(ours + "conv1d.weight", (channels,), sections=convolved)
    yield _rule(ours + "A_log", theirs + "A_log", heads)
    yield _rule(ours + "dt_bias", theirs + "dt_bias", heads)
    # The one norm that transformers does not centre at zero.
    yield Rule(ours + "out_norm.weight", (Part(theirs + "norm.weight", (net.value_dim,)),), shift=-1.0)
    yield _rule(ours + "out_proj.weight", theirs + "out_proj.weight", width, values)


def _latent_attention(shape: Shape, ours: str, theirs: str) -> Iterator[Rule]:
    attention, width = shape.attention, shape.hidden_size
    heads, rank = attention.heads, attention.key_rank
    query, values = attention.plain_dim + attention.rotary_dim, attention.value_dim
    yield _rule(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", width)
    ours, theirs = ours + "self_attention.", theirs + "self_attn."
    if attention.query_rank is None:
        yield _rule(ours + "linear_q_proj.weight", theirs + "q_proj.weight", heads * query, width)
    else:
        narrow, up = attention.query_rank, ours + "linear_q_up_proj."
        yield _rule(ours + "linear_q_down_proj.weight", theirs + "q_a_proj.weight", narrow, width)
        yield _rule(up + "layer_norm_weight", theirs + "q_a_layernorm.weight", narrow)
        yield _rule(up + "weight", theirs + "q_b_proj.weight", heads * query, narrow)
    compressed = theirs + "kv_a_proj_with_mqa.weight"
    yield _rule(ours + "linear_kv_down_proj.weight", compressed, rank + attention.rotary_dim, width)
    up, rows = ours + "linear_kv_up_proj.", heads * (attention.plain_dim + values)
    yield _rule(up + "layer_norm_weight", theirs + "kv_a_layernorm.weight", rank)
    yield _rule(up + "weight", theirs + "kv_b_proj.weight", rows, rank)
    yield _rule(ours + "linear_proj.weight", theirs + "o_proj.weight", width, heads * values)


def _experts(shape: Shape, ours: str, theirs: str) -> Iterator[Rule]:
    experts, width = shape.experts, shape.hidden_size
    yield _rule(ours + "router.weight", theirs + "gate.weight", experts.count, width)
    if experts.score == "sigmoid":
        yield _rule(ours + "router.expert_bias", theirs + "gate.e_score_correction_bias", experts.count)
    for expert in range(experts.count):
        names = f"{ours}experts.local_experts.{expert}.", f"{theirs}experts.{expert}."
        yield from _mlp(shape, experts.width, *names, expert=expert)
    if experts.shared_width:
        shared = theirs + ("shared_experts." if shape.family == "deepseek_v3" else "shared_expert.")
        yield from _mlp(shape, experts.shared_width, ours + "shared_experts.", shared)
    if experts.shared_gate:
        yield _rule(ours + "shared_experts.gate_weight", theirs + "shared_expert_gate.weight", 1, width)


def _mlp(shape: Shape, inner: int, ours: str, theirs: str, expert: int | None = None) -> Iterator[Rule]:
    width = shape.hidden_size
    gate_and_up = tuple(Part(f"{theirs}{name}_proj.weight", (inner, width)) for name in ("gate", "up"))
    yield Rule(ours + "linear_fc1.weight", gate_and_up, expert=expert)
    down = Part(theirs + "down_proj.weight", (width, inner))
    yield Rule(ours + "linear_fc2.weight", (down,), expert=expert)


def _rule(mcore: str, name: str, *shape: int) -> Rule:
    """A tensor that is the same on both sides."""
    return Rule(mcore, (Part(name, shape),))
