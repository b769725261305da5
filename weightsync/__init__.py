"""Versioned weights from the learner to the engines. Imports neither sglang nor megatron."""
