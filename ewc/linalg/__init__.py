"""Linear algebra on tensors: it knows neither networks nor Fisher matrices."""
