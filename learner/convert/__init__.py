"""Weights between Hugging Face and Megatron-Core names."""
