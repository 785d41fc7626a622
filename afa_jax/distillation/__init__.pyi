from .run import distil as distil
from .step import make_distil_step as make_distil_step
from .student import Student as Student
from .teacher import Teacher as Teacher
from .trajectories import Trajectories as Trajectories
