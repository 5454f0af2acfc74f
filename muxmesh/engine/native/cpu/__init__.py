"""A forward pass for CPUs: one compiled function that a team of threads runs over packed weights and the pool."""
