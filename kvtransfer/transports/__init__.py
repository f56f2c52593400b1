"""How a link comes to be: one module per transport. Each gives sockets; framing and protocol are the same for all."""
