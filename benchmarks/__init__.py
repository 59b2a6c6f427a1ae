"""Measurements: scripts that a person runs, and their results with the machine described. Nothing here is a test."""
