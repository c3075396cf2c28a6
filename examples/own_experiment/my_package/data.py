"""Data of one's own: wines, by thirteen chemical measurements."""

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_wine

from experiments.tasks.images import Images, ImageSource


@dataclass(frozen=True)
class Wine(ImageSource):
    """178 wines of three growers, standardised, from scikit-learn.

    Attributes:
        every: each so many wines one is kept for testing.
    """

    every: int = 4
    num_classes = 3

    @property
    def num_pixels(self) -> int:
        """The measurements of a wine."""
        return 13

    def load(self, data_root: Path) -> tuple[Images, Images]:
        """The training and the test wines; a file of your own would lie in ``data_root``."""
        x, y = load_wine(return_X_y=True)
        measured, grower = torch.from_numpy(x).float(), torch.from_numpy(y).long()
        held_out = torch.arange(len(grower)) % self.every == 0
        deviation, mean = torch.std_mean(measured[~held_out], dim=0)
        inputs = (measured - mean) / deviation
        train, test = (Images(inputs[kept], grower[kept]) for kept in (~held_out, held_out))
        return train, test
