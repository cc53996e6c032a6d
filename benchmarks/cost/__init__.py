"""How much memory and time a meta-step takes."""
