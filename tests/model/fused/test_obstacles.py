"""Why a model gets no fused step where it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gma.model.classifier import Classifier
from gma.model.fused.obstacles import FusedPrecision, obstacle
from gma.model.ops.triton.limits import misfit
from tests.model.small import FITTING


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
@pytest.mark.parametrize("conv_kernel", [0, 2, 4])
def test_nothing_in_the_way(precision: FusedPrecision, conv_kernel: int) -> None:
    config = FITTING.model_copy(update={"conv_kernel": conv_kernel})
    assert misfit(config) is None
    assert obstacle(Classifier(config), precision) is None


@pytest.mark.parametrize(
    ("changes", "precision", "reason"),
    [
        ({"causal": False}, "bfloat16", "it is bidirectional"),
        ({"conv_kernel": 5}, "bfloat16", "conv_kernel must be at most 4, not 5"),
        ({"width": 52}, "bfloat16", "multiples of 8, not (52, 80, 256)"),
        ({"mlp_width": 81}, "bfloat16", "multiples of 8, not (48, 81, 256)"),
        ({"width": 56}, "bfloat16", None),
        ({"width": 56}, "fp8", "multiples of 16, not (56, 80, 256)"),
        ({"mlp_width": 88}, "fp8", "multiples of 16, not (48, 88, 256)"),
        ({"heads": 1, "value_dim": 8}, "fp8", "multiples of 16, not (48, 80, 8)"),
        ({"value_dim": 256}, "bfloat16", "of [16, 32, 64, 128], not (16, 32, 256)"),
        ({"routing_dim": 8}, "bfloat16", "of [16, 32, 64, 128], not (8, 32, 128)"),
        ({"num_components": 33}, "fp8", "of [16, 32, 64, 128], not (16, 33, 128)"),
    ],
)
def test_what_is_in_the_way_of_the_fused_step(
    changes: dict[str, object], precision: FusedPrecision, reason: str | None
) -> None:
    found = obstacle(Classifier(FITTING.model_copy(update=changes)), precision)
    assert (found or "").endswith(reason or "")
    assert (found is None) == (reason is None)


@pytest.mark.parametrize(
    ("capability", "shared_memory", "reason"),
    [
        ((8, 9), 101376, "a GPU has compute capability 8.9, less than 9.0"),
        ((12, 0), 101376, "a GPU has 101376 bytes of shared memory a block, less than 232448"),
    ],
)
def test_a_gpu_that_the_fused_step_was_not_written_for(
    capability: tuple[int, int],
    shared_memory: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimpleNamespace(
        name="a GPU",
        major=capability[0],
        minor=capability[1],
        shared_memory_per_block_optin=shared_memory,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    classifier = Classifier(FITTING)
    with FakeTensorMode():
        classifier.embedding.weight = torch.nn.Parameter(torch.empty(1, device="cuda"))
    assert obstacle(classifier) == obstacle(classifier, "fp8") == reason


@pytest.mark.parametrize(("precision", "largest"), [("bfloat16", 65504), ("fp8", 448)])
def test_weights_that_its_hidden_activations_could_overflow_with(
    precision: FusedPrecision, largest: int
) -> None:
    classifier = Classifier(FITTING)
    up = classifier.get_parameter("layers.0.mlp.up.weight")
    # A row of the same sign everywhere: a token's may be the same everywhere too.
    up.data[3] = largest / FITTING.width
    assert obstacle(classifier, precision) is None
    up.data[3] *= 1.01
    reason = f"hidden activations may reach {1.01 * largest:.0f}, more than {largest}"
    assert obstacle(classifier, precision) == reason
