"""Starts every process of a mesh on this machine, watches them, restarts what dies, stops them all."""
