"""Goldbook's package: what the notebooks import, one subject a module."""
