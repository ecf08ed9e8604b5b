"""What users put together: layers, models, losses, parameters, backpropagation through time."""
