"""Whether the claims of the theory hold, and what happens without its assumptions."""
