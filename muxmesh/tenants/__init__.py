"""Tenants of a mesh: who they are, their API keys, and what they may use. Redis holds all of it."""
