from .bootstrap import BootstrapEstimate as BootstrapEstimate
from .bootstrap import Resamples as Resamples
from .compared import Compared as Compared
from .comparison.evaluate import evaluate as evaluate
from .distances import frechet_distance as frechet_distance
from .distances import kernel_distance as kernel_distance
from .screening import Screening as Screening
from .trials import run_search as run_search
