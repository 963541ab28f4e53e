"""Benchmarks: the main job on this machine, and one ZO step against MeZO as published."""
