"""Reward models, one a file. Named in recipes, never imported by name from `align_unlearn`."""
