"""Pieces that several pages share: the model choice, run views, launching, the engine panel."""
