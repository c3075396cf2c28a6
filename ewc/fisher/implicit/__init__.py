"""The matrix-free Fisher: products by differentiating the network."""
