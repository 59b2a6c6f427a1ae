"""Measurements of speed, memory and fidelity beside other libraries, and their reports."""
