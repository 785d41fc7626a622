"""Ways to fuse experts inside one prediction: the method, its trained aggregators, and their files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
