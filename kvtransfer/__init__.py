"""Moves KV blocks between processes. Knows bytes, layouts and peers; no model, no tensors.

api          what the engine thread sees; `endpoint.make_endpoint` implements it
plan         which bytes of one pool become which bytes of another (pure)
protocol     states and actions; `sending`, `receiving`, `lanes` and `liveness` are the state machines (pure)
messages     what peers say; `frames` puts it on a stream (pure); `auth` is the handshake (pure)
pool         views, digests and copies, by `native` code where there is a compiler; `cuda` does it on a device
arrival      verifies a frame while it lands; `departure` sends one from where it lies
link         frames on a socket; `connection` adds handshake and role, `switchboard` makes and loses connections
thread       the loop that joins all of it; `transports` has a module for each way to get a socket
"""
