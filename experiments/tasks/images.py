"""Images in memory, and their sources."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ewc.checks import check_count
from experiments.tasks.mnist_files import read_files


@dataclass(frozen=True)
class Images:
    """Flat images with pixels in 0..1 unless standardised, ``[n, pixels]``, and labels ``[n]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


class ImageSource(ABC):
    """A source of images."""

    num_classes: int

    @property
    @abstractmethod
    def num_pixels(self) -> int:
        """The pixels of an image."""

    @abstractmethod
    def load(self, data_root: Path) -> tuple[Images, Images]:
        """The training and the test images."""


@dataclass(frozen=True)
class Digits(ImageSource):
    """1,797 handwritten digits of 8x8 pixels that ship with scikit-learn.

    The test part of the UCI set of E. Alpaydin and C. Kaynak, 1998
    (doi:10.24432/C50P49); nothing is downloaded.

    Attributes:
        test_fraction: the fraction of every class that is kept for testing.

    Raises:
        ValueError: the fraction is not between 0 and 1.
    """

    test_fraction: float = 0.2
    num_classes = 10

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}.")

    @property
    def num_pixels(self) -> int:
        """The pixels of an image, 64."""
        return 64

    def load(self, data_root: Path) -> tuple[Images, Images]:
        """A split of every class, the same for every seed."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        split = train_test_split(x, y, test_size=self.test_fraction, stratify=y, random_state=0)
        x_train, x_test, y_train, y_test = (torch.from_numpy(array) for array in split)
        return (
            Images(x_train.float() / 16, y_train.long()),
            Images(x_test.float() / 16, y_test.long()),
        )


@dataclass(frozen=True)
class MNIST(ImageSource):
    """70,000 handwritten digits of 28x28 pixels (LeCun, Cortes, Burges).

    The files are in ``data_root/MNIST/raw``, as for torchvision.  Missing files are downloaded.
    Every file is verified by its checksum.

    Attributes:
        standardize: subtract the mean of the training pixels (0.1307 of the largest value)
            and divide by their standard deviation (0.3081).
        padding: black pixels that are first added at every edge; 2 gives the 32x32 pixels of van
            de Ven and Tolias (arXiv:1904.07734).

    Raises:
        ValueError: the padding is negative.
    """

    standardize: bool = False
    padding: int = 0
    num_classes = 10

    def __post_init__(self) -> None:
        """Check the padding."""
        check_count(self.padding, "padding", least=0)

    @property
    def num_pixels(self) -> int:
        """The pixels of an image, 784 without padding."""
        return (28 + 2 * self.padding) ** 2

    def load(self, data_root: Path) -> tuple[Images, Images]:
        """60,000 training and 10,000 test images.

        Raises:
            FileNotFoundError: a file is missing and cannot be downloaded.
            ValueError: a file is damaged or cannot be read.
        """
        train_x, train_y, test_x, test_y = read_files(data_root / "MNIST" / "raw")
        edges = ((0, 0), (self.padding, self.padding), (self.padding, self.padding))
        train = _images(np.pad(train_x, edges), train_y)
        test = _images(np.pad(test_x, edges), test_y)
        if self.standardize:
            deviation, mean = torch.std_mean(train.pixels, correction=0)
            for images in (train, test):
                images.pixels.sub_(mean).div_(deviation)
        return train, test


def default_data_root() -> Path:
    """The environment's ``EWC_DATA``, else a folder in the user's cache."""
    if root := os.environ.get("EWC_DATA"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ewc"


def _images(pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Images:
    flat = torch.from_numpy(pixels).flatten(1)
    return Images(flat.float().div_(255), torch.from_numpy(labels).long())
