"""The model: loading it in 4 bits, roles on one base, and the LM head without full logits."""
