"""A stand-in device with a current context, two streams, and a block of device and of pinned memory."""

from __future__ import annotations

import pytest

from tests.standin.cuda import StandInCuda
from tests.standin.helpers import NON_BLOCKING, SIZE, ok, with_context


@pytest.fixture
def cuda() -> StandInCuda:
    return with_context()


@pytest.fixture
def stream(cuda: StandInCuda) -> int:
    return int(ok(cuda.cuStreamCreate(NON_BLOCKING)))


@pytest.fixture
def other(cuda: StandInCuda) -> int:
    return int(ok(cuda.cuStreamCreate(NON_BLOCKING)))


@pytest.fixture
def block(cuda: StandInCuda) -> int:
    return int(ok(cuda.cuMemAlloc(SIZE)))


@pytest.fixture
def pinned(cuda: StandInCuda) -> int:
    return int(ok(cuda.cuMemHostAlloc(SIZE, 0)))
