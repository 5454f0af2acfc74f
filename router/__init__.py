"""The router: validates, tokenizes, waits for credits, dispatches both phases, returns text."""
