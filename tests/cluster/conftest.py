"""The shipped specs of clusters, and a way to try another text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from elastrain.cluster.check import check_cluster
from elastrain.cluster.document import read_cluster
from elastrain.errors import SpecError

CLUSTERS = Path(__file__).parents[2] / "clusters"


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., list[str]]:
    """Return the problems of a text as `cluster check` tells them, `LINE: …` each; [] where it is sound."""
    (tmp_path / "onprem-prices.yaml").write_text((CLUSTERS / "onprem-prices.yaml").read_text())
    path = tmp_path / "cluster.yaml"

    def find(text: str, *sets: str) -> list[str]:
        path.write_text(text)
        try:
            check_cluster(read_cluster(path, sets))
        except SpecError as error:
            lines = str(error).replace(f"{path}:", "").splitlines()
            return [f"{line.split(':', 1)[0]}: {line.split(': ', 1)[1]}" for line in lines]
        return []

    return find
