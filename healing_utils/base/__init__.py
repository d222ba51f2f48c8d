"""What every floor stands on: errors for people, records, leases, progress, paths."""
