"""Full precision during the pass, and torch's settings afterwards."""

import pytest
import torch
from torch import nn

from ewc import Diagonal, Kronecker, fisher_information

PLACES = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
    "mkldnn.rnn": torch.backends.mkldnn.rnn,
}


def settings():
    return {name: place.fp32_precision for name, place in PLACES.items()}


class Watching(nn.Module):
    """Notes the settings under which it runs, forwards and backwards."""

    def __init__(self, recurrent=False, fails=False):
        super().__init__()
        self.layer, self.fails = nn.Linear(6, 3), fails
        self.recurrent = nn.LSTM(6, 6, batch_first=True) if recurrent else None
        self.seen = []

    def forward(self, x):
        self.note()
        if self.fails:
            raise RuntimeError("broken on purpose")
        if self.recurrent is not None:
            x = self.recurrent(x[:, None])[0][:, 0]
        outputs = self.layer(x)
        outputs.register_hook(lambda _: self.note())
        return outputs

    def note(self):
        self.seen.append(settings())


@pytest.fixture(autouse=True, params=["default", "tf32", "medium"])
def _before(request):
    """What a user may have set before."""
    before = settings()
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    for name, place in PLACES.items():
        place.fp32_precision = before[name]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=repr)
def test_full_precision_holds_during_the_pass_only(structure, recurrent):
    before, model = settings(), Watching(recurrent)
    data = [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))]
    fisher_information(model, data, structure=structure, full_precision=True)
    assert model.seen
    assert all(set(seen.values()) == {"ieee"} for seen in model.seen)
    assert settings() == before


def test_without_it_the_settings_are_the_users():
    before, model = settings(), Watching()
    fisher_information(model, [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))])
    assert all(seen == before for seen in model.seen)


def test_settings_are_restored_after_an_error():
    before = settings()
    data = [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fisher_information(Watching(fails=True), data, full_precision=True)
    assert settings() == before


def test_a_setting_for_all_operations_is_followed_afterwards():
    data = [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))]
    torch.backends.fp32_precision = "tf32"
    try:
        fisher_information(Watching(), data, full_precision=True)
    finally:
        torch.backends.fp32_precision = "none"
    assert torch.backends.mkldnn.conv.fp32_precision == "none"
