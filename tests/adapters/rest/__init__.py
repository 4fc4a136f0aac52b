"""Tests of the REST application."""
