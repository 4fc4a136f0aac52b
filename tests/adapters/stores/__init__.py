"""Tests of the session stores, beyond what every store has to pass."""
