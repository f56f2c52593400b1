"""Moves KV blocks between processes. Knows bytes, layouts and peers; no model, no tensors."""
