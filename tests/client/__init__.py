"""Tests of ``gateway.client``."""
