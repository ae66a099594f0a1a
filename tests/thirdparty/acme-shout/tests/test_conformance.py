from typing import Any

from flowmesh_core.testing import ExecutorSuite

from acme_shout.spec import EXAMPLE


def without_company(result: Any) -> Any:
    """How many were shouted at once is no part of the answer."""
    return result["items"]


class TestShout(ExecutorSuite):
    executor = "acme.shout"
    refused = ({**EXAMPLE, "volume": 12}, {**EXAMPLE, "volume": "loud"})
    answer = staticmethod(without_company)
