"""Distributed training for reversible networks, with a plan of its own for every device."""
