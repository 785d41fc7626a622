from .ddim import DDIM as DDIM
from .registry import SAMPLERS as SAMPLERS
from .sampler import Sampler as Sampler
from .sampler import image_noise as image_noise
from .sampler import sample as sample
