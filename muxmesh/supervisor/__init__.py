"""Starts the processes of a mesh on one machine, restarts those that exit, and stops all of them."""
