"""Declares ``acme.shout``."""

from __future__ import annotations

from flowmesh_core import Capability, ExecutorInfo, hookimpl


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what shouts."""
    return [
        ExecutorInfo(
            name="acme.shout",
            task_types={"acme.shout"},
            target="acme_shout.executor:Shout",
            capabilities={Capability.CPU, Capability.GROUP, Capability.BATCH_INVARIANT},
            spec="acme_shout.spec:ShoutSpec",
            settings="acme_shout.spec:ShoutSettings",
            result="acme_shout.spec:ShoutResult",
            example="acme_shout.spec:EXAMPLE",
            inputs={"rows"},
            group_key=["volume"],
            variables=["ACME_SHOUT_MARK"],
        )
    ]
