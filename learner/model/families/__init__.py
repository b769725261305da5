"""The families of models that are built, each with the fields of its config.json.

A field is read, or must have the one value that is built, or says nothing about the mathematics;
any other is refused by name (`learner/model/hf_config.py`).
"""

from learner.model.families.base import Family
from learner.model.families.deepseek_v3 import DeepseekV3
from learner.model.families.nemotron_h import NemotronH
from learner.model.families.qwen3 import Qwen3, Qwen3Moe, Qwen3Next

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, tuple[str, type[Family]]] = {
    "qwen3": ("Qwen3ForCausalLM", Qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", Qwen3Moe),
    "qwen3_next": ("Qwen3NextForCausalLM", Qwen3Next),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DeepseekV3),
    "nemotron_h": ("NemotronHForCausalLM", NemotronH),
}
"""Of each `model_type` its one architecture and its fields."""
