"""Fine-tuning runs: configuration, data, the loop and its records."""
