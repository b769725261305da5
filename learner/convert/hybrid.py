"""Which Hugging Face tensors make up which tensor of a Mamba-2 hybrid (Nemotron-H)."""

from __future__ import annotations

from collections.abc import Iterator

from learner.convert.layouts import query_key_value
from learner.convert.rule import Part, Rule
from learner.model.shape import Shape


def hybrid_rules(shape: Shape) -> Iterator[Rule]:
    """Every tensor exactly once, in the order of export."""
    width, vocabulary = shape.hidden_size, (shape.vocab_size, shape.hidden_size)
    yield _rule("embedding.word_embeddings.weight", "backbone.embeddings.weight", *vocabulary)
    layers = {"M": _mamba, "*": _attention, "-": _mlp}
    for number, kind in enumerate(shape.hybrid.pattern):
        ours, theirs = f"decoder.layers.{number}.", f"backbone.layers.{number}."
        yield from layers[kind](shape, ours, theirs + "norm.weight", theirs + "mixer.")
    yield _rule("decoder.final_norm.weight", "backbone.norm_f.weight", width)
    if not shape.tied:
        yield _rule("output_layer.weight", "lm_head.weight", *vocabulary)


def _mamba(shape: Shape, ours: str, norm: str, theirs: str) -> Iterator[Rule]:
    mamba, width, ours = shape.hybrid.mamba, shape.hidden_size, ours + "mixer."
    inner, shared = mamba.heads * mamba.head_dim, mamba.groups * mamba.state
    convolved = (("x", inner), ("B", shared), ("C", shared))
    channels = inner + 2 * shared
    yield _rule(ours + "in_proj.layer_norm_weight", norm, width)
    rows = inner + channels + mamba.heads
    yield Rule(
        ours + "in_proj.weight",
        (Part(theirs + "in_proj.weight", (rows, width)),),
        sections=(("z", inner), *convolved, ("dt", mamba.heads)),
    )
    for name, dims in (("weight", (channels, 1, mamba.kernel)), ("bias", (channels,))):
        yield Rule(
            f"{ours}conv1d_{name}",
            (Part(f"{theirs}conv1d.{name}", dims),),
            sections=convolved,
            stored=f"{ours}conv1d.{name}",
        )
    for name in ("A_log", "D", "dt_bias"):
        yield _rule(ours + name, theirs + name, mamba.heads)
    yield _rule(ours + "norm.weight", theirs + "norm.weight", inner)
    yield _rule(ours + "out_proj.weight", theirs + "out_proj.weight", width, inner)


def _attention(shape: Shape, ours: str, norm: str, theirs: str) -> Iterator[Rule]:
    attention, width, ours = shape.attention, shape.hidden_size, ours + "self_attention."
    query, keys = attention.heads * attention.head_dim, attention.groups * attention.head_dim
    rows = {"q": query, "k": keys, "v": keys}
    parts = tuple(Part(f"{theirs}{name}_proj.weight", (count, width)) for name, count in rows.items())
    yield _rule(ours + "linear_qkv.layer_norm_weight", norm, width)
    yield Rule(ours + "linear_qkv.weight", parts, order=query_key_value(attention))
    yield _rule(ours + "linear_proj.weight", theirs + "o_proj.weight", width, query)


def _mlp(shape: Shape, ours: str, norm: str, theirs: str) -> Iterator[Rule]:
    width, inner, ours = shape.hidden_size, shape.dense_width, ours + "mlp."
    yield _rule(ours + "linear_fc1.layer_norm_weight", norm, width)
    yield _rule(ours + "linear_fc1.weight", theirs + "up_proj.weight", inner, width)
    yield _rule(ours + "linear_fc2.weight", theirs + "down_proj.weight", width, inner)


def _rule(mcore: str, name: str, *shape: int) -> Rule:
    return Rule(mcore, (Part(name, shape),))
