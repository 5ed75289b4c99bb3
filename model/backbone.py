"""The backbone of a classifier: what reads tokens, whatever they are read for."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from gma.model.config import BackboneConfig
from gma.model.cpu import CpuLayers
from gma.model.layers import MLP, Layer
from gma.model.ops.choice import choose
from gma.model.ops.chunked import Rows
from gma.model.ops.cpu.library import library
from gma.model.products import Precision
from gma.model.state import State

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Token ids in, what is known at each of them out."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.kernels: CpuLayers | None = None
        """What reads in place of the layers, where it can."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.5 * (parameter.shape[1] * config.layers) ** -0.5)

    @property
    def dtype(self) -> torch.dtype:
        """What states and sums are kept in: at least float32."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    @property
    def mixers(self) -> str:
        """The name of what reads: kernels in place of the layers, or the operation that these use,
        see `gma.model.ops.choice`."""
        return self.kernels.name if self.kernels else self._layer(0).mixer.operation.name

    @property
    def precision(self) -> str:
        """What layers multiply in."""
        if self.kernels:
            return self.kernels.precision
        return str(self.embedding.weight.dtype).removeprefix("torch.")

    def choose_mixers(self, precision: Precision = "float32") -> None:
        """Use the fastest implementation where the weights are, in their dtype.

        Other precisions are those of the kernels for CPUs. Raises ValueError where these do not
        read.
        """
        weight = self.embedding.weight
        operation = choose(self.config, weight)
        self.kernels, missing = None, "they read causal models in float32 alone"
        if self.config.causal and weight.device.type == "cpu" and weight.dtype == torch.float32:
            found = library()
            if isinstance(found, str):
                missing = found
                if precision == "float32":
                    logger.warning("reading is slower without the kernels for CPUs: %s", found)
            else:
                layers = [self._layer(index) for index in range(self.config.layers)]
                self.kernels = CpuLayers(layers, self.config, found, precision)
        if precision != "float32" and self.kernels is None:
            raise ValueError(f"{precision} needs the kernels for CPUs: {missing}")
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.mixer.operation = operation

    def hidden_reach(self) -> float:
        """Return a bound that no hidden activation of any layer exceeds."""
        return max(module.reach() for module in self.modules() if isinstance(module, MLP))

    def new_states(self, documents: int) -> State:
        """Make states of documents of which nothing was read yet, where the weights are."""
        device = self.embedding.weight.device
        return State.zeros(self.config, documents, device=device, dtype=self.dtype)

    def hidden(
        self, x: Tensor, rows: Rows, states: State, usage: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take embedded tokens (R, C, W) through causal layers.

        Returns hidden (R, C, W), and the states' memory, mass and tail after them. `usage` gets
        each layer's, (R, H, K).
        """
        if self.kernels and self.kernels.take(x):
            return self.kernels.hidden(x, rows, states, usage)
        memories, masses, tails = [], [], []
        for index, layer in enumerate(self.layers):
            state = states.memory[:, index], states.mass[:, index], states.tail[:, index]
            x, memory, mass, tail = layer(x, *state, rows, usage)
            memories.append(memory)
            masses.append(mass)
            tails.append(tail)
        return x, torch.stack(memories, 1), torch.stack(masses, 1), torch.stack(tails, 1)

    def layers_of(self, number: int) -> tuple[Layer | None, Layer | None]:
        """Return the layer whose memory pass `number` reads, and the one whose memory it writes.

        A bidirectional model's passes are 0 to L: the first reads none, the last writes none.
        """
        last = number == self.config.layers
        return (
            self._layer(number - 1) if number > 0 else None,
            None if last else self._layer(number),
        )

    def hidden_between(
        self, reads: Layer | None, writes: Layer | None, x: Tensor, rows: Rows, states: State
    ) -> tuple[Tensor, State]:
        """Take x (R, C, W) through the pass between two layers, see `layers_of`.

        The first pass takes embedded tokens, each other what the one before it gave. It reads the
        memory that the pass before wrote, all of it, and writes the next layer's.
        """
        if reads is not None:
            x = reads.recall(x, states.memory[:, 0], states.mass[:, 0], rows)
        if writes is None:
            return x, states
        x, tail = writes.convolve(x, states.tail[:, 1], rows)
        memory, mass = writes.mixer.write(x, rows)
        return x, replace(
            states,
            memory=torch.stack([states.memory[:, 0], states.memory[:, 1] + memory], 1),
            mass=torch.stack([states.mass[:, 0], states.mass[:, 1] + mass], 1),
            tail=torch.stack([states.tail[:, 0], tail], 1),
        )

    def _layer(self, index: int) -> Layer:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer

    def hidden_alone(self, x: Tensor, rows: Rows) -> Tensor:
        """Take embedded tokens (R, C, W) through all layers, each row a whole document."""
        if self.config.causal:
            return self.hidden(x, rows, self.new_states(len(x)))[0]
        states, all_begin = self.new_states(len(x)), rows.lengths.new_ones(len(x)).bool()
        for number in range(self.config.passes):
            layers = self.layers_of(number)
            x, states = self.hidden_between(*layers, x, rows, states.turned(all_begin))
        return x
