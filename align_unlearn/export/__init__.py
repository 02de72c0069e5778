"""From an adapter to a model folder that is plain transformers, and proof that it still behaves as the adapter did."""
