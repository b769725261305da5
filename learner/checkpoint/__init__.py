"""Checkpoints of the learner: Megatron-Core distributed checkpoints, written beside the training.

folder.py    names, what is complete, what is kept
state.py     model and optimizer as pieces of whole tensors, and back
snapshot.py  a copy of the pieces in memory that two processes share
saver.py     the learner's side
writer.py    the process that writes
"""
