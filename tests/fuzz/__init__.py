"""Throw damaged input at a real gateway for a while: ``python -m tests.fuzz --minutes 10 --seed 1``."""
