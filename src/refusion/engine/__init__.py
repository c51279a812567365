"""Requests and batches: everything about who runs when, nothing about which token wins."""
