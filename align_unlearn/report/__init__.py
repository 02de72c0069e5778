"""`audit.json` and its records → one self-contained page that a person can look at."""
