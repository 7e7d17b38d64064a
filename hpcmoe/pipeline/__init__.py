"""Many tokens at once: micro-batches in lanes, each plain torch code, which take turns wherever one would wait."""
