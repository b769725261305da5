"""The replay stream: records, codec, and the control plane in Redis. Imports no torch."""
