"""`gpurnn.torch` against torch.nn."""
