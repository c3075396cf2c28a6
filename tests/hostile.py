"""What hostile input may end in: an answer, or one clear error; and what it may not change."""

import random
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
CODE = (ROOT / "ewc", ROOT / "experiments")

CLEAR = (ValueError, TypeError, FloatingPointError, NotImplementedError)
"""The errors that a wrong argument may raise, and no others below them such as UnicodeError."""


def outcome(call, kinds=CLEAR):
    """The answer of a call and ``None``, or ``None`` and its error, which must be clear."""
    try:
        return call(), None
    except Exception as error:
        check_clear(error, kinds)
        return None, error


def check_clear(error, kinds=CLEAR):
    """Check that an error is raised by this project, in a line that a user understands.

    The error of a network is passed on as it is: it has a note with the batch.
    """
    # An error while another is handled is a surprise, unless it is raised from it.
    assert error.__context__ is None or error.__suppress_context__, describe(error)
    if any(note.startswith("The model was called with ") for note in notes_of(error)):
        return
    message = str(error)
    assert type(error) in kinds, describe(error)
    assert raised_in(error), describe(error)
    assert message.endswith("."), describe(error)
    assert len(message.splitlines()) == 1, describe(error)
    assert len(message) < 1000, describe(error)


def notes_of(error):
    return getattr(error, "__notes__", [])


def raised_in(error):
    """Whether the innermost frame of an error is in the project's own code."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return any(path.is_relative_to(folder) for folder in CODE)


def describe(error):
    return f"{type(error).__name__}: {error} {notes_of(error)}"


def snapshot(model):
    """All that a call must leave as it was: of the network, and of the process."""
    return {
        "values": {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()},
        "places": {n: id(t) for n, t in model.state_dict(keep_vars=True).items()},
        "trained": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "settings": (torch.is_grad_enabled(), torch.get_default_dtype()),
    }


def assert_unchanged(model, before):
    """Check that nothing is different from a :func:`snapshot`, bit by bit."""
    after = snapshot(model)
    for key, was in before.items():
        if key in ("values", "gradients", "torch"):
            torch.testing.assert_close(after[key], was, rtol=0, atol=0, equal_nan=True, msg=key)
        else:
            assert after[key] == was, key
