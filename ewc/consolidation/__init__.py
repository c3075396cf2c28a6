"""What the EWC penalty is made of: quadratics, and how they are put together."""

from ewc.consolidation.consolidation import Consolidation, Online, Separate
from ewc.consolidation.quadratic import Quadratic

__all__ = ["Consolidation", "Online", "Quadratic", "Separate"]
