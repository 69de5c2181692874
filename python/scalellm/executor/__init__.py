"""Runs a batch on devices."""
