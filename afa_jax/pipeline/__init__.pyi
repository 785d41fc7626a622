from .ensemble import Ensemble as Ensemble
from .exporting import MERGE_KINDS as MERGE_KINDS
from .exporting import Merge as Merge
