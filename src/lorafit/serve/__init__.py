"""Many adapters behind one model: what `lorafit serve` starts."""
