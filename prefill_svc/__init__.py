"""Prefill workers: compute prompts, sample the first token, hand the lease over."""
