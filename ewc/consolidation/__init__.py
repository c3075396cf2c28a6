"""What the EWC penalty is made of: quadratics, and how they are put together."""

from ewc.consolidation.consolidation import Consolidation, Online, Separate
from ewc.consolidation.quadratic import Quadratic
from ewc.consolidation.update import Implicit, InLoss, Update

__all__ = ["Consolidation", "Implicit", "InLoss", "Online", "Quadratic", "Separate", "Update"]
