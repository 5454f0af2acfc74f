"""How long will this answer be? Guesses output lengths, online. No I/O, no gRPC, no torch."""
