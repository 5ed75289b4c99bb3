"""A document that goes on, on a worker in another process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from gma.service.engine.opening import Opening, Past
from gma.service.engine.progress import Progress
from gma.service.link.client import OpenDocument
from tests.service.link.remote import IDS, Remote, run


async def last(document: OpenDocument) -> Progress:
    return [progress async for progress in document][-1]


def test_what_was_kept_goes_on_over_the_connection(checkpoint: Path) -> None:
    async def test(service: Remote) -> None:
        model = (await service.remote.info())["fingerprint"]
        whole = Opening(
            "whole", IDS, False, False, False, past=Past(model, b""), keep_tokens=1, steady=True
        )
        with closing(await service.remote.open(whole)) as document:
            await document.feed(IDS[:0], last=True)
            expected = await last(document)
        first = whole._replace(tokens=IDS[:17])
        with closing(await service.remote.open(first)) as document:
            await document.feed(IDS[17:20], last=True)
            kept = (await last(document)).kept
        assert kept
        assert (kept.tokens, kept.chunks) == (16, 2)  # chunks have 8
        then = whole._replace(tokens=IDS[16:], past=kept.past)
        with closing(await service.remote.open(then)) as document:
            await document.feed(IDS[:0], last=True)
            found = await last(document)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert found.kept
        assert expected.kept
        assert found.kept.past == expected.kept.past

    run(checkpoint, test)
