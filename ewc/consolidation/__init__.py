"""What the EWC penalty is made of: quadratics, and how they are put together."""
