"""What both machines share, and both against PyTorch and float64."""
