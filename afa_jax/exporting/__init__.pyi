from .merge import merge_experts as merge_experts
from .outputs import Wanted as Wanted
from .pair import Publication as Publication
from .pair import export_pair as export_pair
