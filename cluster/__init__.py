"""Topology, launchers, supervision and the CLI. The only package that imports Ray."""
