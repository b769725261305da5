"""The architecture of a model, whatever family its config.json names.

`learner/model/hf_config.py` reads it, `learner/model/spec.py` and `build.py` build it, and
`learner/convert/names.py` lists its tensors.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Attention(msgspec.Struct, frozen=True):
    """Softmax attention with grouped key-value heads and normed queries and keys."""

    heads: int
    """Query heads."""
    groups: int
    """Key and value heads; divides the query heads."""
    head_dim: int
    """Width of one head."""
    rotary: float = 1.0
    """Share of a head's width that is rotated."""
    gated: bool = False
    """Whether the output is multiplied by the sigmoid of a gate projected beside the queries."""


class Yarn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """YaRN's stretch of the rotary embedding, in config.json's own names."""

    factor: float
    """How many times longer sequences may be than those of pretraining."""
    original_max_position_embeddings: int
    """Longest sequence of pretraining, in tokens."""
    mscale: float
    """With the next one, how much larger rotated queries and keys are: see `_yarn_get_mscale`."""
    mscale_all_dim: float
    """The same for attention as a whole."""
    beta_fast: float = 32.0
    """Rotations in that length above which a frequency stays as it is."""
    beta_slow: float = 1.0
    """Rotations in that length below which a frequency is divided by `factor`."""


class LatentAttention(msgspec.Struct, frozen=True):
    """Multi-head latent attention (MLA): keys and values go through a low-rank bottleneck."""

    heads: int
    """Query, key and value heads."""
    query_rank: int | None
    """Width of the queries' bottleneck; None: queries are projected directly."""
    key_rank: int
    """Width of the bottleneck of keys and values."""
    plain_dim: int
    """Width of a query or key head that is not rotated."""
    rotary_dim: int
    """Width of a query or key head that is rotated; shared by all heads of the keys."""
    value_dim: int
    """Width of a value head."""
    yarn: Yarn | None = None
    """Stretch of the rotary embedding; None: none."""


class DeltaNet(msgspec.Struct, frozen=True):
    """Gated DeltaNet: linear attention with a decaying state and a short convolution."""

    key_heads: int
    """Query and key heads; divides the value heads."""
    value_heads: int
    """Value heads."""
    key_dim: int
    """Width of a query or key head."""
    value_dim: int
    """Width of a value head."""
    kernel: int
    """Taps of the causal convolution."""


class Experts(msgspec.Struct, frozen=True):
    """A mixture of gated MLPs, of which a router chooses a few for each token."""

    count: int
    """Experts."""
    chosen: int
    """Experts of a token."""
    width: int
    """Inner width of an expert."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores; with sigmoid a correction bias helps to choose."""
    normalised: bool = True
    """Whether the weights of a token's experts sum to `scale`."""
    scale: float = 1.0
    """Factor on the weights."""
    groups: int = 1
    """Groups of experts, of which only some are looked at for a token."""
    chosen_groups: int = 1
    """Groups looked at for a token."""
    shared_width: int = 0
    """Inner width of the expert that every token passes; 0: none."""
    shared_gate: bool = False
    """Whether that expert's output is multiplied by the sigmoid of a gate."""


class Mamba(msgspec.Struct, frozen=True):
    """Mamba-2: a linear recurrence whose decay and input depend on the token, and a short convolution."""

    heads: int
    """Heads of the state."""
    head_dim: int
    """Width of one head."""
    groups: int
    """Groups of heads that share their input and output projections; divides the heads."""
    state: int
    """Numbers a channel remembers."""
    kernel: int
    """Taps of the causal convolution."""
    chunk: int
    """Tokens that the kernels take at a time."""


class Hybrid(msgspec.Struct, frozen=True):
    """A stack of layers that have one part each, instead of attention and MLP in every layer."""

    pattern: str
    """From the embedding up, in Megatron-Core's letters: M Mamba-2, * attention without rotation or norms
    of queries and keys, - an MLP with squared ReLU and no gate."""
    mamba: Mamba
    """Its Mamba-2 layers."""


class Layer(msgspec.Struct, frozen=True):
    """What stands in one layer."""

    delta_net: bool
    """Gated DeltaNet instead of softmax attention."""
    experts: bool
    """Experts instead of one dense MLP."""


class Shape(msgspec.Struct, frozen=True):
    """Everything that fixes the architecture."""

    family: str
    """`model_type` of config.json; what tensors are called depends on it."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    dense_width: int
    """Inner width of a dense MLP."""
    layers: tuple[Layer, ...]
    """From the embedding up; none where `hybrid` says what they are."""
    attention: Attention | LatentAttention
    """Softmax attention of the layers that have it."""
    norm_eps: float
    """Epsilon of every norm."""
    max_length: int
    """Longest sequence, in tokens."""
    rope_theta: float
    """Base of the rotary embedding."""
    tied: bool
    """Whether the output layer is the embedding."""
    delta_net: DeltaNet | None = None
    """Linear attention of the layers that have it."""
    experts: Experts | None = None
    """Experts of the layers that have them."""
    mtp_layers: int = 0
    """Layers of multi-token prediction that a checkpoint may have beside the trained ones."""
    hybrid: Hybrid | None = None
    """Layers of one part each."""
    zero_centred: bool = False
    """Whether norms multiply by 1 + weight."""
