"""Many steps: data, model, training, inference, and the figures that come of them."""
