"""The memory and the admission of one unit: KV pool, leases, credits and grants to compute."""
