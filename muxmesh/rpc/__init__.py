"""gRPC for all services: server, channels, status codes of errors, conversion between messages and values."""
