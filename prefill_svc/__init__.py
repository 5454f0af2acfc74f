"""Prefill workers: they compute prompts, sample the first token, and hand the lease off to a decode worker."""
