"""Parametric families: their densities, expectations, Fisher information and geometry."""
