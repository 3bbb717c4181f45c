"""Adapters in the files of other programs: checked after they were written."""
