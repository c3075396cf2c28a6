"""The quadratics of the EWC penalty, and how those of several tasks are combined."""

from ewc.consolidation.consolidation import Consolidation, Online, Separate
from ewc.consolidation.quadratic import Quadratic
from ewc.consolidation.update import Implicit, InLoss, Update

__all__ = ["Consolidation", "Implicit", "InLoss", "Online", "Quadratic", "Separate", "Update"]
