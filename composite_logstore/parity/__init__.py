"""Whether children hold the same events, and copying those that one of them misses."""
