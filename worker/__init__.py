"""What prefill and decode workers share: attachment to a unit, leases, sequence KV, the compute grant, the process."""
