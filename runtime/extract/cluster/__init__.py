"""Answers a run's questions on the nodes of a Ray cluster: this process reads documents and writes records, workers
answer."""

from granite4v.runtime.extract.cluster.model import OnRay, RayModel

__all__ = ["OnRay", "RayModel"]
