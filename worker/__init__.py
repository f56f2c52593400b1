"""What both worker roles share: front process, rank process, leases, heartbeat."""
