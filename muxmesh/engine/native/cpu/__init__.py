"""The forward pass for CPUs: a team of threads runs one compiled function over packed weights and the KV pool."""
