"""Engines: the seam (`api`), the step engine with its pure scheduler, and the runners of steps (native, sim)."""
