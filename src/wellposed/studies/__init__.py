"""Studies: one module a paper, named after its slug. Each tests the claims that the paper's card registers."""
