"""The servers that tests, the demo and the benchmarks start."""
