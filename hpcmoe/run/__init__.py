"""Many steps: training, inference, the optimizer, gradient sums, replicas, rebalancing."""
