"""Distillation: one ordinary checkpoint that predicts as a method of many experts does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
