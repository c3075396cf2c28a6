"""Linear algebra on tensors, independent of networks and Fisher matrices."""
