"""Model definitions: one decoder, device-blind."""
