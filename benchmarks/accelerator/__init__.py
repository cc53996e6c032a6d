"""What only an accelerator can answer: device memory, seconds, matrix units, precision."""
