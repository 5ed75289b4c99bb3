"""How large the models of a task are."""

from __future__ import annotations

from typing import NamedTuple

from gma.model.config import ModelConfig

HEAD = 64
"""Width of a head's values, of all mixers that do not say otherwise."""


class Size(NamedTuple):
    """The backbone's size, and that of GMA in it, by which all others' parameters are matched."""

    width: int
    layers: int
    routing: int = 32
    components: int = 32
    vocabulary: int = 256
    labels: int = 0
    """Classes of a document; 0 if tokens are what is asked for."""

    @property
    def heads(self) -> int:
        return self.width // HEAD

    def config(self, *, form: str, causal: bool = True, mlp: int = 0) -> ModelConfig:
        """Return GMA's configuration, whose MLP is by default 8/3 as wide as the model."""
        return ModelConfig.model_validate(
            {
                "name": "comparison",
                "labels": ("one", "other"),
                "vocab_size": self.vocabulary,
                "width": self.width,
                "layers": self.layers,
                "heads": self.heads,
                "routing_dim": self.routing,
                "value_dim": HEAD,
                "num_components": self.components,
                "mlp_width": mlp or self.width * 8 // 3 // 8 * 8,
                "form": form,
                "causal": causal,
            }
        )
