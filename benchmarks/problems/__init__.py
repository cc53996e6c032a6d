"""Tasks and networks that the benchmarks are run on."""
