"""Several models on one device, with real processes: shared by the arbiter, or each model on its own part of it."""
