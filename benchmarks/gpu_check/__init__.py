"""Checks of the GPU path on a machine with a GPU, each in a process of its own. See CONTRIBUTING.md."""
