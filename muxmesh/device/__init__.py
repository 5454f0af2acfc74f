"""The unit's device memory from the worker's side: the pool, the addresses of token blocks, and copies to swap."""
