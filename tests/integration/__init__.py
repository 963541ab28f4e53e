"""The real engine with the bundled model."""
