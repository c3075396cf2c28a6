"""Networks that use their layers in every way, for the Fisher pass to get right."""

import pytest
import torch
from torch import nn

slow_way = pytest.mark.filterwarnings("ignore:The Fisher pass differentiates the network one ex")
"""For tests of networks that no rule covers: the warning about them is expected."""


class Sequential2d(nn.Module):
    """Linear layers on [n, t, d]: one weight at many positions of an example."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.unflatten(1, (2, 3)))).sum(1))


class TimeFirst(Sequential2d):
    """The positions come first: dimension 0 is not the example."""

    def forward(self, x):
        hidden = self.inner(x.unflatten(1, (2, 3)).transpose(0, 1))
        return self.head(torch.tanh(hidden).sum(0))


class FoldedRows(Sequential2d):
    """Examples and positions share one dimension of rows."""

    def forward(self, x):
        hidden = self.inner(x.reshape(-1, 3)).reshape(-1, 2, 4)
        return self.head(torch.tanh(hidden).sum(1))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.square(torch.tanh(self.square(x)))))


class TiedWeights(CalledTwice):
    def __init__(self):
        super().__init__()
        self.copy = nn.Linear(6, 6)
        self.copy.weight = self.square.weight

    def forward(self, x):
        return self.head(torch.tanh(self.copy(torch.tanh(self.square(x)))))


class UsedOutside(CalledTwice):
    """The layer's weight is also used without the layer being called."""

    def forward(self, x):
        return self.head(torch.tanh(self.square(x) @ self.square.weight))


class Branching(CalledTwice):
    """A branch on the data: nothing can be vectorised over examples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.head(self.square(x) * self.scale if x.sum() > 0 else self.square(x).sin())


class Identity(torch.autograd.Function):
    """An operation that does not say how to be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class Opaque(CalledTwice):
    def forward(self, x):
        return self.head(Identity.apply(torch.tanh(self.square(x))))


class Derivative(nn.Module):
    """The outputs contain a derivative of the network, as in physics-informed ones."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x):
        x = x.detach().requires_grad_(True)
        value = self.net(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.cat([value, slope[:, :2]], 1)


class SortedRows(CalledTwice):
    """The layer sees the examples in an order of their own."""

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.square(x[order]))[order.argsort()])


class TwoOrders(CalledTwice):
    """One call in order, one the other way round."""

    def forward(self, x):
        backwards = self.square(x.flip(0)).sin().flip(0)
        return self.head(torch.tanh(self.square(x)) + backwards)


class WritesIntoItsInput(CalledTwice):
    def forward(self, x):
        return self.head(self.square(x.sub_(1.5)).tanh())


class BiasOnly(nn.Module):
    """The weight is frozen, and the layer's input is changed in place afterwards."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.layer.weight.requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.clone()
        h = self.layer(x)
        x += h.tanh()
        return self.head(x)


class Words(nn.Module):
    """Integer inputs, a sparse embedding tied to nothing, recurrence and attention."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4, sparse=True)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.embedding((2 * x).long().abs().clamp_max(8))
        hidden = self.attention(self.recurrent(hidden)[0])
        return self.head(hidden[:, -1])


def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))


def frozen_weight():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class TwoHeads(nn.Module):
    """Multi-head in Avalanche's way: the task labels pick the head of every example."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x, task_labels):
        hidden = torch.tanh(self.body(x))
        out = hidden.new_zeros(len(x), 3)
        for task in torch.unique(task_labels):
            mask = task_labels == task
            out[mask] = self.heads[int(task)](hidden[mask])
        return out


class Disturbing(nn.Module):
    """Writes to a buffer and draws random numbers even in evaluation mode."""

    def __init__(self, fails=False):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = fails

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        if self.fails and self.calls > 3:
            raise RuntimeError("broken on purpose")
        return self.norm(self.linear(x))


class Head(nn.Module):
    """A layer on [n, 3, 4] sequences, made from 12 features, and three outputs.

    Args:
        layer: what goes between.
        call: how it is called, from the layer and the sequence to [n, features].
        features: how many.
    """

    def __init__(self, layer, call, features):
        super().__init__()
        self.layer = layer
        self.call = call
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.call(self.layer, x.unflatten(1, (3, 4))))


class Functional(nn.Module):
    """Parameters that are in no layer: a matrix, a scale, a shift, positions, a gate."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(1, 3, 4))
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.scale = nn.Parameter(torch.randn(3))
        self.shift = nn.Parameter(torch.randn(3))
        self.gate = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        hidden = (x.unflatten(1, (3, 4)) + self.positions).tanh().mean(1)
        return self.gate * (hidden @ self.weight * self.scale - self.shift)


class Grams(nn.Module):
    """An embedding whose weight is also the last layer's, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)

    def forward(self, x):
        tokens = (x > 0).long() + (x > 1).long()
        return nn.functional.linear(self.embedding(tokens).tanh().mean(1), self.embedding.weight)


def _flat(*layers):
    return nn.Sequential(*layers)


def _tokens(x):
    return (x.flatten(1) * 2).long().clamp(-3, 3) + 3


def _channels(x, count):
    return torch.stack([(channel * x).sin() for channel in range(1, count + 1)], 1)


def _conv(layer, shape, features):
    return nn.Sequential(
        nn.Unflatten(1, shape), layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)
    )


LAYERS = {
    "linear": lambda: _flat(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)),
    "sequence": lambda: Head(nn.Linear(4, 3), lambda f, x: f(x).tanh().sum(1), 3),
    "conv1d": lambda: _conv(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect", groups=2), (2, 6), 24
    ),
    "conv2d": lambda: _conv(
        nn.Conv2d(1, 2, 2, stride=2, padding=1, dilation=2, padding_mode="circular"), (1, 3, 4), 8
    ),
    "conv2d_same": lambda: _conv(
        nn.Conv2d(1, 2, 2, padding="same", padding_mode="replicate", bias=False), (1, 3, 4), 24
    ),
    "conv1d_outputs": lambda: _conv(nn.Conv1d(4, 12, 2, groups=2), (4, 3), 24),
    # Wide and plain: by lags and by shifts.
    "wide_conv1d": lambda: Head(
        nn.Conv1d(16, 2, 3, padding=2, dilation=2, groups=2),
        lambda f, x: f(_channels(x, 16).flatten(2)).tanh().mean(2),
        2,
    ),
    "wide_conv2d": lambda: Head(
        nn.Conv2d(8, 2, (3, 2), padding=1), lambda f, x: f(_channels(x, 8)).tanh().mean((2, 3)), 2
    ),
    "conv3d": lambda: _conv(nn.Conv3d(1, 2, 2, padding=1), (1, 2, 2, 3), 72),
    "conv_transpose2d": lambda: _conv(
        nn.ConvTranspose2d(2, 4, 2, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (2, 2, 3),
        4 * 4 * 6,
    ),
    "embedding": lambda: Head(
        nn.Embedding(7, 2, padding_idx=3), lambda f, x: f(_tokens(x)).tanh().sum(1), 2
    ),
    "layer_norm": lambda: Head(nn.LayerNorm(4), lambda f, x: f(x).flatten(1), 12),
    "group_norm": lambda: Head(nn.GroupNorm(3, 3), lambda f, x: f(x).flatten(1), 12),
    "batch_norm": lambda: Head(nn.BatchNorm1d(3), lambda f, x: f(x).flatten(1), 12),
    "attention": lambda: Head(
        nn.MultiheadAttention(4, 2, batch_first=True), lambda f, x: f(x, x, x)[0].sum(1), 4
    ),
    "cross_attention": lambda: Head(
        nn.MultiheadAttention(4, 2),
        lambda f, x: f(*(y.transpose(0, 1) for y in (x, x.sin(), x.cos())))[0].sum(0),
        4,
    ),
    "transformer": lambda: Head(
        nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), lambda f, x: f(x).sum(1), 4
    ),
    "lstm": lambda: Head(nn.LSTM(4, 2, batch_first=True), lambda f, x: f(x)[0][:, -1], 2),
    "gru": lambda: Head(
        nn.GRU(4, 2, bidirectional=True, batch_first=True), lambda f, x: f(x)[0][:, -1], 4
    ),
    "called_twice": lambda: Head(nn.Linear(4, 4), lambda f, x: f(f(x[:, 0]).tanh()), 4),
    "tied": Grams,
    "frozen": lambda: _freeze(_flat(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 3))),
    "functional": Functional,
    "no_rule": lambda: Head(nn.PReLU(3), lambda f, x: f(x).flatten(1), 12),
}
"""A network of every kind of layer, with 12 inputs and 3 outputs."""


def _freeze(model):
    model[0].weight.requires_grad_(False)
    return model


class ChangesItsGraph(CalledTwice):
    """Uses its layers in another order for every sign of the first input of the batch."""

    def forward(self, x):
        if x[0, 0] > 0:
            return self.head(torch.tanh(self.square(x)))
        hidden = self.square(x.reshape(-1, 2, 3).transpose(0, 1).repeat(1, 1, 2))
        return self.head(torch.tanh(hidden).sum(0))


class SlopesPerChannel(nn.Module):
    """A PReLU, whose gradient torch 2.15 vectorises wrongly, between two linear maps."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.slopes = nn.PReLU(3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.slopes(self.inner(x).unflatten(1, (3, 2)))
        return self.head(hidden.flatten(1))


class WrongTogether(torch.autograd.Function):
    """An operation whose rule for vmap is wrong: it doubles what it should keep."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return _Backward.apply(gradient)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return 2 * x, in_dims[0]


class LiesToVmap(CalledTwice):
    def forward(self, x):
        return self.head(WrongTogether.apply(torch.tanh(self.square(x))))
