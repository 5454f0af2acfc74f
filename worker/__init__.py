"""What prefill and decode workers share: attachment to a unit, leases, sequence KV, compute grant and process."""
