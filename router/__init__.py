"""The router: validates and tokenizes requests, waits for credits, calls the workers and streams their output."""
