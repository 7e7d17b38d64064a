"""What is kept: the run's record, its checkpoints, and the activations somebody asked for, all in HDF5."""
