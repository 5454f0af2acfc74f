"""Benchmarks: each prints its table and writes build/bench/NAME.json. Run by `make bench-NAME`; no test depends on them."""
