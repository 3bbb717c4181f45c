"""A journal of a training loop of one's own: records, checkpoints, the best adapter, a verdict, a report."""

from lorafit.journal.journal import Journal

__all__ = ["Journal"]
