"""Open-loop load generation, trace replay and reports."""
