"""The object that people use: experts as one ensemble, which makes pictures, trains, compares, merges and exports.

    from afa_jax import Ensemble

    ens = Ensemble.from_config("configs/emoji.py", workdir="models/emoji/afa")
    out = ens("octopus and pizza, noto style", num_images=4, seed=1, maps=True)
    out.save("pictures")

``ensemble.py`` says where an ensemble comes from; what it can do is in ``sampling.py``, ``comparing.py``,
``training.py`` and ``exporting.py``. The commands are thin callers of it. What is wrong with an argument is an
InputError, the line that the command prints, before JAX is imported and before anything is read or written.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
