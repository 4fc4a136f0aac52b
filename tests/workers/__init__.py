"""Tests of ``gateway serve --workers``."""
