"""What to minimise: forget objectives and retain regularisers, pure functions of a `CompletionView`."""
