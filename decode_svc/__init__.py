"""Decode workers: they take over leases from prefill, batch continuously, and stream tokens to routers."""
