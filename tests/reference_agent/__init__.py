"""Tests of the reference Agent Runtime."""
