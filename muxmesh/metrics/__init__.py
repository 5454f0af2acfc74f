"""Metrics of a process and the HTTP endpoint that serves them. Knows no service: each adds its own collectors."""
