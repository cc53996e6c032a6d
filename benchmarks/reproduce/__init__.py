"""The experiment of "Memory-Reduced Meta-Learning with Guaranteed Convergence" (AAAI 2025)."""
