"""One unit's memory and admission: the pool, leases, credits and the grant to compute."""
