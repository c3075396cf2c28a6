"""The quadratics of the EWC penalty, and how those of several tasks are combined."""

from ewc.consolidation.combination import Consolidation, Online, Separate
from ewc.consolidation.quadratic import Quadratic
from ewc.consolidation.update import ImplicitSteps, InLoss, Update

__all__ = ["Consolidation", "ImplicitSteps", "InLoss", "Online", "Quadratic", "Separate", "Update"]
