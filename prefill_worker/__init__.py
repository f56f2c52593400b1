"""The prefill role: a policy over worker/, with a KV sender."""
