"""The GPU of a job of a sweep whose jobs run side by side."""

import torch


def take_device(number: int) -> None:
    """Make one GPU after the other the current one, by the number of the job.

    ``device=auto`` and ``device=cuda`` then mean this one.  Where a scheduler gives the job its
    own GPU, that is the only one there is.
    """
    if (count := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(number % count)
