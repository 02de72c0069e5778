"""How to minimise it: thin subclasses of TRL's trainers, the drift budget, and the job that a recipe describes."""
