"""Other people's functions, in processes of their own that a deadline and a memory limit end.

Rewards and tools run here. This contains accidents: a function that hangs, crashes, floods its output,
leaks memory or leaves children behind costs one call and its process. It is no sandbox: the code
reads and writes what its user may.
"""
