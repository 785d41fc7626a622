from .files import load_config as load_config
from .files import make_config as make_config
from .method_options import check_entry as check_entry
from .schema import check as check
from .schema import complete as complete
