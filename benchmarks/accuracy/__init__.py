"""How well the methods do on held-out tasks."""
