"""The commands of ``gateway``, one per module: what it is asked for, what it does, how it exits."""
