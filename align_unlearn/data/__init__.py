"""Data: rows in any of the field's formats → examples → tokens and labels → batches of forget and retain rows."""
