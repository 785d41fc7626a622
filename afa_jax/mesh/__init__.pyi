from .experts import map_experts as map_experts
from .experts import weighted_sum as weighted_sum
from .parallel import make_mesh as make_mesh
from .parallel import mesh_of as mesh_of
from .parallel import place as place
from .processes import join as join
