"""Session stores: the same semantics on each engine."""
