"""Files and networks: every container is a Checkpoint, and a Checkpoint becomes a network."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
