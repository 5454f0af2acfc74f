"""Measures the step times of models on this machine, for `muxmesh profile`."""
