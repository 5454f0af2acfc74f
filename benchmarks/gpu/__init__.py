"""Speed of the GPU path on a machine with a GPU."""
