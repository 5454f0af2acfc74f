"""The native engine: Llama-family models, computed exactly, with KV read in place from the pool."""
