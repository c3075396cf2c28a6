"""How each kind of operation gives the gradients of its parameters."""
