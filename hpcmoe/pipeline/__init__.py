"""Many tokens at once: micro-batches and layers following each other without barriers."""
