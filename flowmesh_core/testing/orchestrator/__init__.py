"""A stand-in for the earlier orchestrator: all that a worker can observe of it."""

from flowmesh_core.testing.orchestrator.host import StandInOrchestrator
from flowmesh_core.testing.orchestrator.http import HttpRequest
from flowmesh_core.testing.orchestrator.tasks import TaskRecord

__all__ = ["HttpRequest", "StandInOrchestrator", "TaskRecord"]
