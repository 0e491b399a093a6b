"""Studies: fair comparisons of optimizers, from recipe to table and picture."""
