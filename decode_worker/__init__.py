"""The decode role: a policy over worker/, with a KV receiver."""
