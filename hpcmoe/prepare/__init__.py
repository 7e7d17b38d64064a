"""What fits: sizes, memory, budget, shards and placement of a run, found before anything is opened."""
