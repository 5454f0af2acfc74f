"""gRPC, once for all services: server, channels, the table between errors and status codes, message conversion."""
