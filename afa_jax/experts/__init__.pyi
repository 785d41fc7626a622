from .checks import find_checkpoints as find_checkpoints
from .checks import mismatches as mismatches
from .frozen import Experts as Experts
from .frozen import load_experts as load_experts
from .frozen import with_fusion as with_fusion
from .sources import parse_base as parse_base
from .sources import parse_expert as parse_expert
