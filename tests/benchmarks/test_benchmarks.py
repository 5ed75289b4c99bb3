"""The benchmarks' commands on tiny sizes: that they check before they time, and report it all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import definitions, directions, figure, mixers, models
from benchmarks.contenders import CONTENDERS
from benchmarks.mixtures import Problem, Size
from benchmarks.timing import markdown, tokens_name

CPU = torch.device("cpu")
TINY = Size(heads=2, routing=16, components=16, value=16)
ON_CPU = [contender for contender in CONTENDERS if not contender.gpu]


@pytest.mark.parametrize(
    ("command", "options", "verdict"),
    [
        # Our kernels, which are interpreted here, are checked below.
        (mixers, ["--only", "PyTorch", "cumulative"], "check"),
        (mixers, ["--only", "PyTorch", "--backward"], "check"),
        pytest.param(models, [], "verdict", marks=pytest.mark.long),
        (models, ["--only", "ours"], "verdict"),
    ],
    ids=["mixers", "mixers-backward", "models", "models-only"],
)
def test_command(
    command: Any,
    options: list[str],
    verdict: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *options])
    name = command.__name__.rpartition(".")[2]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    printed = capsys.readouterr().out
    assert {check[verdict] for check in found["checks"]} == {"passed"}
    assert found["results"]
    contenders = {result["contender"] for result in found["results"]}
    if "--only" in options:
        assert all(any(word in name for word in options) for name in contenders)
    for result in found["results"]:
        assert 0 < result["low"] <= result["seconds"] <= result["high"]
        assert f"| {result['contender']} |" in printed
        assert tokens_name(result["tokens"]) in printed
    if find_spec("matplotlib"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_both_directions_are_measured_at_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "2", "--chunk", "64", "--longest", "16384", "--shorts", "2"]
    directions.main(["--tiny", *options])
    printed = capsys.readouterr().out
    assert printed.count("| 4k | 16k |") == 3
    assert len(re.findall(r"^\| (causal|bidirectional) \|", printed, re.MULTILINE)) == 8


class TestChecks:
    @pytest.mark.parametrize("contender", ON_CPU, ids=lambda contender: contender.name)
    def test_right_one_passes(self, contender: Any) -> None:
        passed, found = mixers.checked(contender, 200, TINY, CPU)
        assert passed, found

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda out: out * 1.05, "error"),
            (lambda out: out.index_fill(1, torch.tensor(3), torch.nan), "not finite"),
            (lambda out: out + 1e-4 * out.sum(), "leak"),
        ],
    )
    def test_wrong_one_is_not_timed(self, spoil: Callable[[Tensor], Tensor], why: str) -> None:
        right = ON_CPU[0]

        def build(*given: Any) -> Any:
            problem = right.build(*given)

            def run(*inputs: Tensor) -> tuple[Tensor, ...]:
                out, *rest = problem.run(*inputs)
                return spoil(out), *rest

            return replace(problem, run=run)

        run = mixers.Run(CPU, TINY, cap_s=1.0, budget_s=0.01)
        assert not run.check([right._replace(build=build)], 200)
        assert "not timed" in run.checks[0]["check"]
        assert why in run.checks[0]["found"]


class TestGradients:
    @torch.no_grad()
    def test_are_of_all_inputs_and_anew_at_every_call(self) -> None:
        x, y = torch.rand(2, 1, 5, 2, 3) + 0.5
        given: list[Tensor] = []

        def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            given.extend([x, y])
            return x * y.square(), x

        problem = Problem(run, (x, y), tuple).with_gradients()
        given.clear()
        out, d_x, d_y = problem()
        torch.testing.assert_close(out, x * y.square())
        torch.testing.assert_close(d_y * y, 2 * d_x * x)
        x.mul_(3)
        out, *found = problem()
        torch.testing.assert_close(out, x * y.square())
        torch.testing.assert_close(found, [d_x, 3 * d_y])
        assert not any(z.requires_grad for z in (x, y, out))
        assert all(z.is_leaf and z.requires_grad for z in given)
        assert len({id(z) for z in given}) == 4

    @pytest.mark.parametrize("contender", ON_CPU, ids=lambda contender: contender.name)
    def test_of_values_are_those_of_a_linear_map(self, contender: Any) -> None:
        """The output is linear in the values, so that it and they give the same product."""
        problem = contender.build(100, TINY, CPU)
        torch.manual_seed(1)
        found = problem.with_gradients()()
        torch.manual_seed(1)
        d_out, (q, k, val) = torch.randn_like(found[0]), problem.inputs
        assert [d.shape for d in found[1:]] == [q.shape, k.shape, val.shape]
        pairs = (found[0], d_out), (val, found[3])
        products = [(a.double() * b.double()).sum() for a, b in pairs]
        torch.testing.assert_close(*products, rtol=0.02, atol=0.5)


class TestDefinitions:
    """The closed forms against the recurrences that they sum up."""

    def test_decayed_sums(self) -> None:
        q, k = (torch.randn(20, 2, 4, dtype=torch.float64) for _ in range(2))
        val, decay = torch.randn(20, 2, 3).double(), -torch.rand(20, 2, 4).double()
        for kept in (decay, decay[..., 0]):
            factor = (kept if kept.dim() == 3 else kept[..., None].expand_as(k)).exp()
            state, expected = torch.zeros(2, 4, 3, dtype=torch.float64), []
            for t in range(len(q)):
                state = state * factor[t, :, :, None] + k[t, :, :, None] * val[t, :, None]
                expected.append((q[t, :, :, None] * state).sum(1))
            found = definitions.linear_attention(q, k, val, kept)
            torch.testing.assert_close(found, torch.stack(expected))

    @pytest.mark.parametrize("causal", [False, True])
    def test_softmax(self, causal: bool) -> None:
        q, k, val = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
        expected = functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), val.transpose(0, 1), is_causal=causal
        )
        found = definitions.softmax_attention(q, k, val, causal=causal)
        torch.testing.assert_close(found.transpose(0, 1), expected)

    def test_rotation_keeps_products_of_equal_angles(self) -> None:
        q, k = (torch.randn(5, 1, 8, dtype=torch.float64) for _ in range(2))
        angle = torch.rand(5, 1, 2).double()
        turned = [definitions.rotated(x, angle) for x in (q, k)]
        torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (q * k).sum(-1))
        assert not torch.allclose(turned[0][..., :4], q[..., :4])
        torch.testing.assert_close(turned[0][..., 4:], q[..., 4:])


def test_names_do_not_overlap() -> None:
    places = figure.spread([0.0, 0.1, 0.2, 5.0], gap=1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(places))
    assert places[3] == 5.0
    assert sum(places[:3]) == pytest.approx(0.3)


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert [tokens_name(n) for n in (100, 1024, 4 << 20)] == ["100", "1k", "4M"]
