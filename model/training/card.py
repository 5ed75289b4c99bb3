"""The model card: what a checkpoint's README.md says."""

from __future__ import annotations

import json

from gma.model.config import ModelConfig
from gma.model.hub import METADATA
from gma.model.training.config import TrainingConfig
from gma.model.training.measured import Measured


def card_of(model: ModelConfig, config: TrainingConfig, measured: Measured, step: int) -> str:
    """Write the card of a checkpoint that was measured after so many steps."""
    begun = _card(model, measured, f"step {step} of {config.steps}, averaged weights")
    return f"""{begun}
Training configuration:

```json
{config.model_dump_json(indent=2)}
```
"""


def card_of_average(model: ModelConfig, measured: Measured, count: int) -> str:
    """Write the card of the mean of so many checkpoints."""
    return _card(model, measured, f"the mean of {count} trainings' weights")


def _card(model: ModelConfig, measured: Measured, made: str) -> str:
    any_number = "any number of which a document may have, " if model.multi_label else ""
    told = "".join(f"{name}: {json.dumps(value)}\n" for name, value in METADATA.items())
    return f"""---
{told}---

# {model.name}

A Gaussian Mixture Attention classifier (arXiv:2606.18283) with {len(model.labels)} labels,
{any_number}{model.layers} layers of {model.width}; {made}.

On the valid split:

{measured.table()}
"""
