from .method import METHOD_KINDS as METHOD_KINDS
from .method import Method as Method
from .method import make_method as make_method
from .method import method_name as method_name
from .models import Models as Models
from .models import NotTrained as NotTrained
from .options import SampleOptions as SampleOptions
from .specs import parse_method as parse_method
