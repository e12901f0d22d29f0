"""Ablations: the plan of a sweep, its runs, and what is read back from them: tables, plots, TensorBoard."""
