"""Decode workers: wait for leases, batch continuously, stream tokens."""
