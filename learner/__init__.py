"""The learner: turns batches of rollout groups into new policy versions on Megatron-Core."""
