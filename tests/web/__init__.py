"""Tests of ``gateway/web``."""
