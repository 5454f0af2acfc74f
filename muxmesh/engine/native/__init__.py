"""The native engine: computes Llama-family models in f32 and reads KV in place from the pool."""
