"""No ordinary layer goes the slow way: in any type, under autocast, by arithmetic with noise."""

import pytest
import reference
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import prune

from ewc import Dense, fisher_information
from ewc.fisher import recognised
from ewc.fisher.network_state import plain_operations
from ewc.parameters import flatten
from ewc.pullback.graph import Graph
from ewc.pullback.tape import operations_of

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Bottleneck(nn.Module):
    """A block of ResNet-50, with its stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.block = nn.Sequential(
            *(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()),
            *(nn.Conv2d(2, 2, 3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()),
            *(nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(pixels(x)).relu()
        x = (self.block(x) + self.shortcut(x)).relu()
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class ScaledResidual(nn.Module):
    """A block of ConvNeXt: channels last, and a scale for the residual."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 7, padding=3, groups=3)
        self.norm, self.up, self.down = nn.LayerNorm(3), nn.Linear(3, 5), nn.Linear(5, 3)
        self.gamma = nn.Parameter(torch.rand(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = pixels(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(functional.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class ChannelScale(ScaledResidual):
    """ConvNeXt as torchvision has it: the scale has the shape [c, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        x = pixels(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head((x + self.gamma * y).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A block of EfficientNet."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.project = nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.GroupNorm(3, 3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = functional.silu(self.norm(self.depthwise(self.expand(pixels(x)))))
        gate = self.excite(functional.silu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(self.project(x * gate.sigmoid()).mean((2, 3)))


def attend(q, k, v, heads, mask=None, causal=False):
    """Attention of [n, t, d] with several heads."""
    q, k, v = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


class VisionTransformer(nn.Module):
    """A ViT as timm has it; the class token is repeated by ``expand``."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 5, 4))
        self.norm1, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.scale1, self.scale2 = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.norm2, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def embedded(self, x):
        x = self.patches(pixels(x)).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions

    def forward(self, x):
        x = self.embedded(x)
        x = x + attend(*self.qkv(self.norm1(x)).chunk(3, 2), 2).mul(1.0) @ self.out.weight.T
        x = x + self.scale1 * self.out(x)
        x = x + self.down(functional.gelu(self.up(self.norm2(x)))) * self.scale2
        return self.head(self.norm(x)[:, 0])


class SlicedPositions(VisionTransformer):
    """Positions and tokens in other ways: slices, ``repeat``, one vector for all positions."""

    def embedded(self, x):
        x = self.patches(pixels(x)).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.repeat(len(x), 1, 1), x + self.positions[:, 1:5]), dim=1)
        return x + self.positions[0, 0]


class PositionsFirst(VisionTransformer):
    """CLIP: the positions are the first dimension, and a learned temperature."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(5, 4))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = super().embedded(x).permute(1, 0, 2) + self.flat[:, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        features = functional.normalize(self.norm(x[0]), dim=-1)
        return self.temperature.exp() * self.head(features) / self.scale1[0].square()


class RelativePositions(VisionTransformer):
    """Swin: the bias of a pair of positions is looked up by their distance."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        places = torch.arange(5)
        self.register_buffer("index", places[:, None] - places + 4)

    def biases(self):
        return self.table

    def forward(self, x):
        x = self.embedded(x)
        bias = self.biases()[self.index.view(-1)].view(5, 5, -1).permute(2, 0, 1).unsqueeze(0)
        q, k, v = (z.unflatten(2, (2, 2)).transpose(1, 2) for z in self.qkv(x).chunk(3, 2))
        scores = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.head((scores @ v).transpose(1, 2).flatten(2).mean(1))


class CurvedPositions(RelativePositions):
    """Swin V2: a small network over constants gives the biases."""

    def __init__(self):
        super().__init__()
        self.register_buffer("distances", torch.linspace(-1, 1, 9)[:, None])
        self.curve = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))

    def biases(self):
        return self.table + 2 * self.curve(self.distances).sigmoid()


class Conv1D(nn.Module):
    """The linear layer of GPT-2: the weight is [in, out]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class GPT2(nn.Module):
    """Learned positions, a causal mask, and the head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(3, 4), nn.Embedding(16, 4)
        self.norm1, self.attend, self.out = nn.LayerNorm(4), Conv1D(12, 4), Conv1D(4, 4)
        self.norm2, self.up, self.down = nn.LayerNorm(4), Conv1D(6, 4), Conv1D(4, 6)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.words.weight

    def positions(self, t):
        return torch.arange(t)[None]

    def forward(self, x):
        ids = tokens(x, 3)
        x = self.words(ids) + self.places(self.positions(ids.shape[1]))
        q, k, v = self.attend(self.norm1(x)).split(4, dim=2)
        x = x + self.out(attend(q, k, v, 2, causal=True))
        x = x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return self.head(self.norm(x))[:, -1]


class FlatPositions(GPT2):
    """nanoGPT: the positions are [t]."""

    def positions(self, t):
        return torch.arange(t)


class RMSNorm(nn.Module):
    """As Hugging Face writes it for LLaMA."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class GemmaNorm(RMSNorm):
    """The scale is one plus the weight."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + self.weight.to(wide.dtype))).type_as(x)


def rotated(x):
    """Rotary position embeddings of [n, t, d]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])[:half]
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angles.cos(), angles.sin()))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class LLaMA(nn.Module):
    """Grouped queries, rotary positions, SwiGLU, no biases."""

    norm = RMSNorm

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4, padding_idx=0)
        nn.init.normal_(self.words.weight)
        self.norm1, self.norm2, self.last = (self.norm(4) for _ in range(3))
        self.q, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.k, self.v = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
        self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = self.words(tokens(x, 5))
        h = self.norm1(x)
        q, k, v = self.q(h), rotated(self.k(h)), self.v(h)
        q = torch.cat([rotated(part) for part in q.chunk(2, 2)], 2)
        q = q.unflatten(2, (2, 2)).transpose(1, 2)
        k, v = (z[:, None].expand(-1, 2, -1, -1) for z in (k, v))
        x = x + self.out(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        h = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.last(x))[:, -1]


class Gemma(LLaMA):
    norm = GemmaNorm


class FusedNorm(LLaMA):
    norm = nn.RMSNorm


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.cell = kind(4, 3, **options)
        self.head = nn.Linear(6 if options.get("bidirectional") else 3, 3)

    def forward(self, x):
        x = self.words(tokens(x, 5))
        if self.cell.batch_first:
            return self.head(self.cell(x)[0][:, -1])
        return self.head(self.cell(x.transpose(0, 1))[0][-1])


class Encoder(nn.Module):
    """torch's own Transformer layers."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unflatten(1, (3, 4))
        if self.layer.self_attn.batch_first:
            return self.head(self.layer(x).mean(1))
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.head(self.layer(x.transpose(0, 1), src_mask=mask).mean(0))


class LoRA(nn.Module):
    """A frozen layer and a product of two narrow ones, as peft has them."""

    def __init__(self, merged=False):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.merged = merged
        self.magnitude = nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unflatten(1, (3, 4))
        if self.merged:  # DoRA: directions and lengths
            weight = self.base.weight + 2.0 * self.b.weight @ self.a.weight
            weight = self.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
            x = functional.linear(x, weight, self.base.bias)
        else:
            x = self.base(x) + self.b(self.a(x)) * 2.0
            x = x + x @ self.a.weight.T @ self.b.weight.T * self.magnitude
        return self.head(x.tanh().mean(1))


class Products(nn.Module):
    """Matrix products by ``einsum``, ``matmul`` and convolutions of width one."""

    def __init__(self):
        super().__init__()
        square = [nn.Parameter(0.5 * torch.randn(4, 4)) for _ in range(3)]
        self.first, self.second, self.third = square
        self.left = nn.Parameter(0.5 * torch.randn(2, 4, 4))
        self.heads = nn.Parameter(0.5 * torch.randn(2, 2, 3))
        self.mix = nn.Parameter(0.5 * torch.randn(5, 3))
        self.narrow = nn.Parameter(0.5 * torch.randn(2, 4, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.unflatten(1, (3, 4))
        x = torch.einsum("nti,oi->nto", x, self.first).tanh()
        x = (x @ self.second).tanh()
        x = (self.third @ x.flatten(0, 1).T).T.unflatten(0, (-1, 3)).sin()
        x = x + functional.conv1d(x.transpose(1, 2), self.narrow.repeat(2, 1, 1)).transpose(1, 2)
        x = torch.einsum("nti,hio->ntho", x, self.left).mean(2)
        x = torch.einsum("st,nti->nsi", self.mix, x).tanh()  # over positions, as in an MLP-Mixer
        x = torch.einsum("nthd,hde->nthe", x.unflatten(2, (2, 2)), self.heads)
        return self.head(x.flatten(2).mean(1))


class Parametrised(nn.Module):
    """Weights that are functions of parameters: normalised, pruned, standardised."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv, self.linear = norm(nn.Conv2d(3, 4, 2)), norm(nn.Linear(4, 5))
        self.pruned = nn.Linear(5, 4)
        prune.l1_unstructured(self.pruned, "weight", 0.4)
        self.standard = nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.linear(self.conv(pixels(x)).tanh().mean((2, 3))).tanh()
        x = self.pruned(x).tanh()
        w = self.standard.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        x = functional.linear(x, w, self.standard.bias.sigmoid())
        return self.head(x * functional.softplus(self.log_scale))


def pixels(x):
    """Images [n, 3, 4, 4] from [n, 12]."""
    waves = [(k * x).sin() for k in range(1, 5)]
    return torch.cat(waves, 1).unflatten(1, (3, 4, 4))


def tokens(x, count):
    """Words [n, 12]; word 0 is the most frequent."""
    return (x * 2).long().abs() % count


NETWORKS = {
    "bottleneck": Bottleneck,
    "convnext": ScaledResidual,
    "convnext_torchvision": ChannelScale,
    "efficientnet": SqueezeExcite,
    "vit": VisionTransformer,
    "sliced_positions": SlicedPositions,
    "clip": PositionsFirst,
    "swin": RelativePositions,
    "swin_v2": CurvedPositions,
    "gpt2": GPT2,
    "nanogpt": FlatPositions,
    "llama": LLaMA,
    "gemma": Gemma,
    "rms_norm": FusedNorm,
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True),
    "lstm_time_first": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN, batch_first=True),
    "encoder": lambda: Encoder(batch_first=True, norm_first=True),
    "encoder_time_first": lambda: Encoder(activation="gelu"),
    "lora": LoRA,
    "dora": lambda: LoRA(merged=True),
    "products": Products,
    "parametrised": Parametrised,
}


def network(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def inputs():
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_ordinary_layer_equals_brute_force(name):
    model, x = network(name).double().eval(), inputs()
    y = torch.zeros(len(x), dtype=torch.long)
    expected = reference.categorical_fisher(model, [(row,) for row in x])
    dense = fisher_information(model, [(x, y)], structure=Dense())
    torch.testing.assert_close(dense.to_dense(), expected, **EXACT)
    batches = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    diagonal = fisher_information(model, batches)
    torch.testing.assert_close(flatten(diagonal.diagonal()), expected.diagonal(), **EXACT)


class Noisy(torch.overrides.TorchFunctionMode):
    """Every function of torch returns gradients with noise, as an accelerator's arithmetic."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.requires_grad and not result.is_leaf:
            result.register_hook(self.noisy)
        return result

    def noisy(self, g):
        return g + self.amount * g.norm() / g.numel() ** 0.5 * torch.randn_like(g)


class Surrounded(nn.Module):
    """A network that runs in a context."""

    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, x):
        with self.context():
            return self.model(x).to(torch.promote_types(x.dtype, torch.float32))


SURROUNDINGS = {
    "float32": (torch.float32, torch.enable_grad, 1e-4),
    "bfloat16": (torch.bfloat16, torch.enable_grad, 0.3),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16), 0.3),
    "noise of TF32": (torch.float32, lambda: Noisy(1e-3), 0.05),
    "noise of bfloat16": (torch.float32, lambda: Noisy(8e-3), 0.3),
}


@pytest.mark.parametrize(
    "around",
    [
        *("bfloat16", "autocast", "noise of TF32"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "noise of bfloat16")),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_ordinary_layer_goes_the_slow_way(name, around):
    if (name, around) == ("swin_v2", "autocast"):
        pytest.skip("autocast copies the constants, which are not recognised then")
    dtype, context, tolerance = SURROUNDINGS[around]
    torch.manual_seed(0)
    x, y = inputs(), torch.zeros(7, dtype=torch.long)
    exact = Surrounded(network(name).double(), torch.enable_grad)
    expected = flatten(fisher_information(exact, [(x, y)]).diagonal())
    model, batch = Surrounded(network(name).to(dtype), context), (x.to(dtype), y)
    assert [use for use in recognised(model, batch) if use.reason] == []
    found = flatten(fisher_information(model, [batch]).diagonal())
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
# A GRU asks for the driver, and constants without entries have no address.
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"gru", "swin_v2"}))
def test_no_ordinary_layer_goes_the_slow_way_by_the_operations_of_a_gpu(name):
    """Tensors without entries show the graph that a GPU would have: other kernels."""
    with FakeTensorMode(), torch.device("cuda"):
        model = NETWORKS[name]().eval()
        x = torch.randn(7, 12)
        with plain_operations(model):
            graph = Graph(model(x))
        uses, _ = graph.uses(dict(model.named_parameters()), 7, set())
        operations, reasons = operations_of(graph, uses)
    assert operations
    assert reasons == {}
