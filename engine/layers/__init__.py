"""The parts that a decoder is made of: linears, norms, rotary embeddings."""
