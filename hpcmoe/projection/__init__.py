"""What a model will do on a cluster before either is there: both described, costs and loads read, a step foretold."""
