"""How fast other libraries make the same meta-step."""
