"""The benchmark of generation: each configuration in a process of its own, all interleaved."""
