"""The workers' side of a unit: shared memory, leases, the grant, and the shell that hosts an engine."""
