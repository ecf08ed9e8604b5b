"""What a GPU is asked for, on the stand-in: arrays, graphs, streams, and when a block does not answer."""
