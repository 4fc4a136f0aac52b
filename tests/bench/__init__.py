"""Tests of ``gateway bench``."""
