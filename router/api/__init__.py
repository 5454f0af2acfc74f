"""The gRPC API of the router. No other module of the router knows the public messages."""
