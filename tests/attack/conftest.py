from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.target import Target, target


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(tmp_path_factory.mktemp("attacked")) as found:
        yield found
