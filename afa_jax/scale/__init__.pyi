from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .memory import Memory as Memory
from .report import Report as Report
from .report import examine as examine
