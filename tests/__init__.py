"""Tests: unit, integration (real engine, real model), e2e (real browser)."""
