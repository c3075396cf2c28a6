"""The spectrum of overparametrised models."""
