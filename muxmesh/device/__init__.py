"""The unit's device memory as a worker reaches it: the pool, where token blocks are in it, and copies out of it."""
