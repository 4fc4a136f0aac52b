"""``gateway bench``: what the gateway costs, measured from outside, beside what else one could run."""
