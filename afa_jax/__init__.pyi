from .errors import InputError as InputError
from .errors import NotFinite as NotFinite
from .errors import Stopped as Stopped
from .evaluation.compared import Compared as Compared
from .evaluation.screening import Screening as Screening
from .pipeline import Ensemble as Ensemble
from .pipeline import Merge as Merge
from .sampling.pictures import Pictures as Pictures

__version__: str
