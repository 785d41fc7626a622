"""The networks of Stable Diffusion 1.x and 2.x. Nothing here knows that there are several experts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
