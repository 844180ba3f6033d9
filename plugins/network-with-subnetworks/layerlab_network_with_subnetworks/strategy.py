"""Network with sub-networks: a network whose layers can be taken off, trained at once with what is left of it.

N. Fuengfusin and H. Tamukoh, "Network with Sub-networks: Layer-wise Detachable Neural Network", Journal of Robotics,
Networking and Artificial Life 7(4), 2020. Sections 3 and 4, equations (1) to (5). The published text has lost its
equations; they are given here as the authors' public code has them.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from layerlab import Preflight, Refused, Run, Strategy, evaluate
from layerlab_network_with_subnetworks.method.chain import NAME, check_detachable, detachable, layers_of, without
from layerlab_network_with_subnetworks.method.networks import perceptron


class NetworkWithSubnetworks(Strategy):
    """Train a chain of layers and its sub-networks at once, on one set of weights.

    Model m is what is left of the network when all but m of its detachable layers are gone, the base being the
    largest. Equation (1) copies the parameters of each model into the next larger one before every mini-batch, so all
    models always hold the same: one set of weights suffices. Each model makes its own forward and backward pass, with
    its own dropout masks. A parameter that model m is the smallest to have is updated with the mean of its gradients
    in models m and m + 1, equation (2); what only the base has, with the base's gradient.
    """

    name: ClassVar[str] = NAME
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "classes"})

    layers: tuple[str, ...] | None = None
    """The layers that can be detached, in the order in which they go. Default: all that leave their input's shape as
    it is, input first: in the paper's perceptron all but the last. `()` trains the network regularly."""
    detach_at_once: int = Field(1, ge=1)
    """How many layers go from one sub-network to the next smaller one."""
    momentum_format: Literal["paper", "tensorflow"] = "paper"
    """Of SGD with momentum α: `paper`: V ← αV + (1−α)G from V = 0, equation (4); `tensorflow`: V ← αV + G, equation
    (3), which is torch's. Other optimizers are left as they are."""
    sharing: Literal["pairs", "all"] = "pairs"
    """Whose gradients a parameter gets the mean of: `pairs`: of the smallest two models that have it; `all`: of every
    model that has it."""
    l2: float = Field(9e-5, ge=0)
    """λ of the penalty λ·Σw²; the paper has 9e-5 for two hidden layers and 9e-6 for one."""
    l2_on: Literal["base", "all"] = "base"
    """Whose loss the penalty is added to: the base's alone, or every model's."""
    l2_biases: bool = False
    """Whether the penalty includes parameters with one dimension: biases and the scales of normalisations."""
    dropout_by: Literal["position", "layer"] = "position"
    """A sub-network's i-th layer drops at the rate of the network's i-th layer (`position`), or each layer keeps the
    rate it has in the base (`layer`)."""
    cuda_graph: bool = False
    """On a GPU, with SGD: capture the whole step in a CUDA graph and replay it; no effect elsewhere."""

    _names: list[str] = PrivateAttr(default_factory=list)
    _detached: list[tuple[str, ...]] = PrivateAttr(default_factory=list)
    _models: list[nn.Module] = PrivateAttr(default_factory=list)
    _levels: list[list[nn.Parameter]] = PrivateAttr(default_factory=list)
    _graph: Any = PrivateAttr(None)
    _graph_key: Any = PrivateAttr(None)
    _graph_tensors: tuple[Tensor, ...] = PrivateAttr(())
    _eager_steps: int = PrivateAttr(0)

    @classmethod
    def example_network(cls, shape: tuple[int, int, int], classes: int) -> nn.Module:
        channels, size, _ = shape
        return perceptron(classes, size, channels, depth=2)

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """`model0`, `model1`, … → names of the layers that it lacks; smallest model first, the base last."""
        return dict(zip(self._names, self._detached, strict=True))

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Say which layers can be detached and how small the smallest network is.

        Raises:
            Refused: as `on_fit_start`.
        """
        order, models = self._sub_networks(network, example)
        with torch.no_grad():
            for model in models:
                copy.deepcopy(model).eval()(example[:2])
        assert isinstance(network, nn.Sequential)
        layers = [name for name, module in network.named_modules() if [*module.parameters(recurse=False)]]
        staying = [name for name in layers if name.partition(".")[0] not in order]
        smallest, base = (sum(parameter.numel() for parameter in model.parameters())
                          for model in (models[0], models[-1]))
        return Preflight.of(
            network, [name for name in layers if name not in staying], otherwise="every sub-network keeps it",
            saves={f"parameters, with {len(order)} layers detached": 1 - smallest / base} if order else {})

    def on_fit_start(self, run: Run) -> None:
        """Find the layers and make the sub-networks.

        Raises:
            Refused: the network is no chain, or has layers that cannot be detached (both are named with their
                shapes), or the optimizer has Nesterov's momentum.
        """
        network = run.training_model
        order, self._models = self._sub_networks(network, run.example)
        gone = [*range(0, len(order), self.detach_at_once), len(order)]
        self._detached = [tuple(order[:count]) for count in reversed(gone)]
        self._names = [f"model{len(order) - count}" for count in reversed(gone)]
        seen: set[nn.Parameter] = set()
        self._levels = []
        for model in self._models:
            self._levels.append([parameter for parameter in model.parameters() if parameter not in seen])
            seen.update(self._levels[-1])
        self._start_momentum(run.optimizer)
        self._graph = self._graph_key = None

    def _sub_networks(self, network: nn.Module, example: Tensor) -> tuple[list[str], list[nn.Module]]:
        """(the layers that go, in their order; the models, smallest first, the base being the network itself).

        Raises:
            Refused: the network is no chain, or has layers that cannot be detached.
        """
        layers_of(network)
        assert isinstance(network, nn.Sequential)
        order = self._order(network, example)
        gone = [*range(0, len(order), self.detach_at_once), len(order)]
        # The base's own first detachable layer first: the shortest sentence about what does not fit.
        for count in gone:
            check_detachable(network, order[:count], example)
        smaller = [without(network, order[:count], self.dropout_by) for count in reversed(gone[1:])]
        # The base is the network itself, so that whatever other strategies do to it holds here too.
        return order, [*smaller, network]

    def _order(self, network: nn.Sequential, example: Tensor) -> list[str]:
        """The layers that go, in their order.

        Raises:
            Refused: none can go.
        """
        if self.layers is not None:
            return list(self.layers)
        chain = layers_of(network)
        if len(chain) < 2:
            raise Refused(f"{NAME} needs a chain of two layers or more, and this one has {len(chain)}; add some.")
        order = detachable(network, example)
        if not order:
            check_detachable(network, [chain[0].name], example)
        return order

    def _start_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Put torch's SGD into the paper's format: dampening α, and V = 0 to start from, where torch starts from G."""
        if self.momentum_format == "tensorflow" or not isinstance(optimizer, torch.optim.SGD):
            return
        for group in optimizer.param_groups:
            if group["nesterov"]:
                raise Refused(
                    f"{NAME}: momentum_format 'paper' is not defined for nesterov=True; use "
                    "momentum_format='tensorflow' or nesterov=False."
                )
            group["dampening"] = group["momentum"]
            if group["momentum"]:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def on_epoch_start(self, run: Run) -> None:
        # Dropouts whose rate differs from the base's are modules of the sub-networks alone.
        for model in self._models[:-1]:
            for module in model.children():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.train()

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        if self.cuda_graph and x.is_cuda and isinstance(run.optimizer, torch.optim.SGD) and not run.after_backward:
            return self._graphed_step(run, x, y)
        return self._step(run, x, y)

    def _step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = self.share_gradients(run, x, y)
        for hook in run.after_backward:
            hook(run)
        run.optimizer.step()
        return loss

    def share_gradients(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Forward and backward of every model; leaves in each parameter's `grad` what equation (2) updates it with.

        Args:
            x: images, (batch, channels, height, width).
            y: labels, (batch,).

        Returns:
            The base's mean loss without the penalty, a scalar.
        """
        run.optimizer.zero_grad(set_to_none=True)
        top = len(self._models) - 1
        loss = torch.zeros((), device=x.device)
        for index, model in enumerate(self._models):
            # Gradients that no rule uses, such as the base's for the last layer in model0-1-2, are never computed.
            first = max(index - 1, 0) if self.sharing == "pairs" else 0
            wanted = [p for level in self._levels[first : index + 1] for p in level if p.requires_grad]
            with run.autocast():
                loss = run.loss(model(x), y)
            if not wanted:
                continue
            gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
            penalised = self.l2 > 0 and (index == top or self.l2_on == "all")
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if penalised and (parameter.ndim > 1 or self.l2_biases):
                    gradient = torch.add(gradient, parameter.detach(), alpha=2 * self.l2)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for index, level in enumerate(self._levels):
            sharers = min(2, top - index + 1) if self.sharing == "pairs" else top - index + 1
            gradients = tuple(p.grad for p in level if p.grad is not None)
            if sharers > 1 and gradients:
                torch._foreach_mul_(gradients, 1 / sharers)
        return loss.detach()

    def _graphed_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """The step replayed from a CUDA graph, captured anew whenever what it has fixed changes."""
        rates = tuple(group["lr"] for group in run.optimizer.param_groups)
        learning = tuple(p.requires_grad for level in self._levels for p in level)
        key = (tuple(x.shape), rates, learning)
        if key != self._graph_key:
            self._graph_key, self._graph, self._eager_steps = key, None, 0
        if self._eager_steps < 3:
            # torch wants some steps on a side stream before it captures; `fit` measures one of these.
            self._eager_steps += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self._step(run, x, y)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if self._graph is None:
            images, labels = x.clone(), y.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._step(run, images, labels)
            self._graph, self._graph_tensors = graph, (images, labels, loss)
        images, labels, loss = self._graph_tensors
        images.copy_(x)
        labels.copy_(y)
        self._graph.replay()
        return loss.clone()

    def on_validation_end(self, run: Run) -> None:
        for name, model in zip(self._names[:-1], self._models[:-1], strict=True):
            scores = evaluate(model, run.test_data, run.loss, autocast=run.autocast)
            run.log(f"{NAME}/{name}/top1", scores["test/top1"])
            run.log(f"{NAME}/{name}/loss", scores["test/loss"])

    def on_fit_end(self, run: Run) -> None:
        # The graph's memory pool goes with it; the network itself is what a user deploys.
        self._graph = self._graph_key = None
        self._graph_tensors = ()

    def networks(self, model: nn.Module) -> dict[str, nn.Sequential]:
        """Every model of a trained network as a plain network of its own, smallest first.

        Args:
            model: the network that this strategy trained, `FitResult.model`.
        """
        assert isinstance(model, nn.Sequential)
        # The shapes were checked when training started.
        return {name: copy.deepcopy(without(model, names, self.dropout_by)).eval()
                for name, names in self.models.items()}
