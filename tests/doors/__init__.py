"""Random calls of drop-ins, each compared with float64: what :mod:`tests.random_doors` makes many of."""
