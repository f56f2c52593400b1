"""HTTP and gRPC front doors, tokenization, admission, placement, dispatch. No torch, no Ray."""
