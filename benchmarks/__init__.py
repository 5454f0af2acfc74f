"""Benchmarks. Each prints a table and writes build/bench/NAME.json. No test depends on them."""
