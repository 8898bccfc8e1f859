from collections.abc import Iterator

import pytest
from builtin_tasks import index_kept


@pytest.fixture(scope="session", autouse=True)
def builtin_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with index_kept(tmp_path_factory):
        yield
