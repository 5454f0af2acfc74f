"""Predicts output lengths from prompts, online. No I/O, no gRPC, no torch."""
