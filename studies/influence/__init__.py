"""The influence of training examples."""
