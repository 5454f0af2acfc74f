"""Engines: the seam (`api`), our step engine with its pure scheduler, and what runs a step (torch, sim)."""
