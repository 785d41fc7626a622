"""Captioned pictures: sources, loading, and data sets made once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
