"""One large inner problem: stochastic bilevel methods beside each other and beside code by hand."""
