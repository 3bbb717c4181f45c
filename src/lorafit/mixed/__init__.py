"""Rows of one batch with different adapters: tables of what each changes, and the products of such a batch."""
