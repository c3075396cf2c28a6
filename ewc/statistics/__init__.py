"""What the Fisher information says of a model: thin users of a :class:`~ewc.FisherMatrix`."""

from ewc.statistics.overlap import fisher_overlap, fisher_overlap_by_layer

__all__ = ["fisher_overlap", "fisher_overlap_by_layer"]
