"""Benchmarks: each prints its table and writes build/bench/NAME.json. No test depends on them."""
