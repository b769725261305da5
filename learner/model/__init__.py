"""Building the trained model on Megatron-Core."""
