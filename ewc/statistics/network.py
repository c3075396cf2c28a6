"""A network as a function of some of its parameters, for derivatives by ``torch.func``."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from ewc.fisher.data_pass import check_outputs
from ewc.fisher.network_state import plain_operations, undisturbed
from ewc.likelihoods import Likelihood
from ewc.parameters import Parameters
from ewc.pullback.batches import Caller
from ewc.pullback.call import Call
from ewc.wrappers import bare, named_parameters, unwrapped


class NetworkFunction:
    """The outputs and losses of a network at any values of some of its parameters.

    Args:
        model: the network, which is not changed.
        names: the names of the parameters that vary.
        likelihood: what the outputs mean.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], likelihood: Likelihood) -> None:
        self.model = bare(model)
        self.likelihood = likelihood
        parameters = dict(named_parameters(model))
        self.parameters = {name: parameters[name].detach() for name in names}
        self.caller = Caller(self.model, next(iter(self.parameters.values())).device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network into evaluation mode, without fused kernels."""
        with unwrapped(self.model), undisturbed(self.model), plain_operations(self.model):
            yield

    def batches(
        self, data: Iterable[object], *, use_targets: bool = True
    ) -> Iterator[tuple[Call, Tensor]]:
        """The arguments and targets of each batch.

        Args:
            data: the batches.
            use_targets: whether the targets must be there and fit the outputs.  Otherwise they
                are empty if a batch has none.

        Raises:
            ValueError: an item is not a batch, it has sample weights, or its targets are missing
                or do not fit the outputs.  Targets ``[n]`` beside outputs ``[n, 1]`` would
                broadcast to ``[n, n]``.
        """
        for index, batch in enumerate(data):
            examples = self.caller.examples(batch, index)
            arguments, targets = examples.arguments, examples.targets
            if examples.weights is not None:
                raise ValueError(
                    f"Batch {index} has sample weights, which only fisher_information takes: "
                    "leave them out."
                )
            if targets is None:
                if use_targets:
                    raise ValueError(f"Batch {index} has no targets: the loss needs them.")
                targets = torch.empty(len(arguments), 0)
            if len(targets):
                outputs = self.outputs(self.parameters, arguments[:1])
                check_outputs(outputs, 1, index)
                outputs = outputs.expand(len(targets), *outputs.shape[1:])
                try:
                    self.likelihood.check_outputs(outputs)
                    if use_targets or self.likelihood.needs_targets(outputs):
                        self.likelihood.check_targets(outputs, targets)
                except ValueError as error:
                    raise ValueError(f"Batch {index}: {error}") from None
            yield arguments, targets

    def outputs(self, parameters: Parameters, arguments: Call) -> Tensor:
        """The outputs ``[n, ...]``."""
        return arguments.called(self.model, parameters)

    def losses(self, parameters: Parameters, arguments: Call, targets: Tensor) -> Tensor:
        """The negative log-likelihoods ``[n]``."""
        return -self.likelihood.log_prob(self.outputs(parameters, arguments), targets)

    def gradients(self, arguments: Call, targets: Tensor) -> Parameters:
        """The gradient of every single loss, ``[n, ...]`` by name."""

        def example_loss(parameters: Parameters, target: Tensor, *tensors: Tensor) -> Tensor:
            alone = arguments.with_tensors([tensor[None] for tensor in tensors])
            return self.losses(parameters, alone, target[None])[0]

        tensors = arguments.tensors()
        dimensions = (None, 0, *[0] * len(tensors))
        each: Callable[..., Parameters] = vmap(grad(example_loss), in_dims=dimensions)
        return each(self.parameters, targets, *tensors)
