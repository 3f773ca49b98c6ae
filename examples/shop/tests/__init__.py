"""The shop's own tests: through real HTTP, on a real replica set."""
