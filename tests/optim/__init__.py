"""Optimisers, clipping, schedules."""
