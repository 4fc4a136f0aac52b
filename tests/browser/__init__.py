"""Tests of the pages in a real headless Chromium."""
