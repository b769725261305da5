"""Actors: an SGLang engine each, kept busy with rollout groups.

An actor leases prompts, lets its engine answer them, scores the answers and publishes the groups to
the replay stream. `engine` starts and drives the SGLang server; `sglang_cpu` lets that server run on
a plain CPU.
"""
